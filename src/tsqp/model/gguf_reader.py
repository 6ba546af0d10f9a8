"""The header of a GGUF file: its metadata, and where each tensor lies."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderField, dequantize
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from gguf.quants import quant_shape_to_byte_shape

from tsqp.errors import CheckpointError, ModelError, UnsupportedModel
from tsqp.model.files import BinaryFile

READABLE_VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000  # as of safetensors; the largest vocabularies take a tenth
WINDOW_BYTES = 2**20  # read at once


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies, and how it is encoded.

    Attributes:
        encoding: a `GGMLQuantizationType`.
        shape: as in PyTorch, rows first.
        offset, size: in bytes; the range lies inside the file.
        row_bytes: of one row; of all of it where there is one dimension.
    """

    name: str
    encoding: Any
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def row_bytes(self) -> int:
        return self.size if len(self.shape) == 1 else self.size // self.shape[0]


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata by key (arrays of strings are left out), and tensors by GGUF name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(file: BinaryFile) -> GGUFHeader:
    """Read and check the header.

    Raises:
        UnsupportedModel: a version or an encoding that cannot be read.
        CheckpointError: cut short, or not a GGUF file.
    """
    _check_version(file)
    try:
        with np.errstate(all="raise"):
            reader = _HeaderReader(file)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
            tensors = {tensor.name: tensor for tensor in reader.stored()}
    except ModelError:
        raise
    except Exception as exc:  # GGUFReader trusts the file and fails in whatever way it happens to
        raise CheckpointError(
            f"{file.path} is cut short or corrupt: fetch it again ({type(exc).__name__})."
        ) from exc
    for encoding in {tensor.encoding for tensor in tensors.values()}:
        _check_encoding(file.path, encoding)
    return GGUFHeader(metadata, tensors)


class _HeaderReader(GGUFReader):  # type: ignore[misc]
    """GGUFReader, which maps no file, is bounded by its size, and reads no lists of strings.

    The library maps the whole file, keeps two arrays for each of a tokenizer's strings, which
    takes seconds, and believes every count it finds.
    """

    def __init__(self, file: BinaryFile) -> None:  # the library's own would map the file
        self._file = file
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._window, self._window_start = b"", 0
        self.fields: OrderedDict[str, ReaderField] = OrderedDict()
        tensors, values = (int(count) for count in self._get(8, np.uint64, 2))
        offset, self._tensors = self._build_tensor_info(self._build_fields(24, values), tensors)
        alignment = self.fields.get("general.alignment")
        each = GGUF_DEFAULT_ALIGNMENT if alignment is None else int(alignment.contents())
        if each < 1 or each & (each - 1):
            raise ValueError("alignment")
        self._data_start = -(-offset // each) * each

    def stored(self) -> list[StoredTensor]:
        """All tensors, which lie inside the file and have names of their own."""
        found = [_stored(field, self._data_start) for field in self._tensors]
        if len({tensor.name for tensor in found}) < len(found):
            raise KeyError("names")
        if any(tensor.offset + tensor.size > self._file.size for tensor in found):
            raise EOFError
        return found

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        raw = self._bytes(int(offset), np.dtype(dtype).itemsize * int(count))
        return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<"))

    def _bytes(self, offset: int, size: int) -> memoryview:
        """Part of the header, of which a piece is kept at a time."""
        if offset + size > self._end:
            raise EOFError
        start = offset - self._window_start
        if not 0 <= start <= start + size <= len(self._window):
            length = min(max(size, WINDOW_BYTES), self._end - offset)
            self._window, self._window_start, start = self._file.read(offset, length), offset, 0
        return memoryview(self._window)[start : start + size]

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != GGUFValueType.ARRAY:
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(
                orig_offs, raw_type
            )
            return found
        item = self._get(orig_offs, np.uint32)
        count = self._get(orig_offs + 4, np.uint64)
        item_type = GGUFValueType(int(item[0]))
        types = [GGUFValueType.ARRAY, item_type]
        start = orig_offs + 12
        if item_type == GGUFValueType.STRING:
            end = self._skip_strings(start, int(count[0]))
            return end - orig_offs, [item, count], [], types
        values = self._get(start, self.gguf_scalar_to_np[item_type], int(count[0]))
        return 12 + values.nbytes, [item, count, values], [2], types

    def _skip_strings(self, offset: int, count: int) -> int:
        for _ in range(count):
            offset += 8 + int.from_bytes(self._bytes(offset, 8), "little")
        self._bytes(offset, 0)
        return offset

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        encoding = int(field.parts[4][0])
        if encoding not in set(GGMLQuantizationType):
            raise UnsupportedModel(
                f"Tensor {field.name[:200]!a} of the GGUF file has the unknown encoding"
                f" {encoding}, which TSQP cannot read: use another quantization."
            )
        return field


def _check_version(file: BinaryFile) -> None:
    start = file.read(0, 8) if file.size >= 8 else b""
    if not start.startswith(b"GGUF"):
        raise CheckpointError(f"{file.path} is not a GGUF file: fetch it again.")
    version = int.from_bytes(start[4:], "little")
    if version not in READABLE_VERSIONS:
        raise UnsupportedModel(f"{file.path} has GGUF version {version}, and TSQP reads 2 and 3.")


def _stored(field: ReaderField, data_start: int) -> StoredTensor:
    _, _, _, dimensions, encodings, offsets = field.parts
    encoding = GGMLQuantizationType(int(encodings[0]))
    shape = tuple(int(size) for size in reversed(dimensions))
    quant_shape_to_byte_shape(shape, encoding)  # raises where a row is no number of blocks
    block, block_bytes = GGML_QUANT_SIZES[encoding]
    size = math.prod(shape) // block * block_bytes
    return StoredTensor(field.name, encoding, shape, data_start + int(offsets[0]), size)


def _check_encoding(path: Path, encoding: Any) -> None:
    _, block_bytes = GGML_QUANT_SIZES[encoding]
    try:
        dequantize(np.zeros(block_bytes, dtype=np.uint8), encoding)
    except NotImplementedError as exc:
        raise UnsupportedModel(
            f"{path} holds tensors in the encoding {encoding.name}, which TSQP cannot read: use"
            " another quantization."
        ) from exc
