"""The header of a GGUF file: its metadata, and where each tensor lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderField, dequantize
from gguf.constants import GGML_QUANT_SIZES

from tsqp.errors import CheckpointError, ModelError, UnsupportedModel
from tsqp.model.files import BinaryFile

READABLE_VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies, and how it is encoded.

    Attributes:
        encoding: a `GGMLQuantizationType`.
        shape: as in PyTorch, rows first.
        offset, size: in bytes; the range lies inside the file.
    """

    name: str
    encoding: Any
    shape: tuple[int, ...]
    offset: int
    size: int


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
            reader = _HeaderReader(file.path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
    except ModelError:
        raise
    except Exception as exc:  # GGUFReader trusts the file and fails in whatever way it happens to
        raise CheckpointError(
            f"{file.path} is cut short or corrupt: fetch it again ({type(exc).__name__})."
        ) from exc
    tensors = {tensor.name: _stored(tensor) for tensor in reader.tensors}
    for encoding in {tensor.encoding for tensor in tensors.values()}:
        _check_encoding(file.path, encoding)
    return GGUFHeader(metadata, tensors)


class _HeaderReader(GGUFReader):  # type: ignore[misc]
    """GGUFReader, bounded by the file's size and not reading lists of strings.

    The library keeps two arrays for each of a tokenizer's strings, which takes seconds, and
    believes every count it finds.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise EOFError
        return super()._get(offset, dtype, count, override_order)

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
        view = memoryview(self.data)
        for _ in range(count):
            length = int.from_bytes(view[offset : offset + 8], "little")
            offset += 8 + length
            if offset > len(view):
                raise EOFError
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


def _stored(tensor: Any) -> StoredTensor:
    return StoredTensor(
        name=tensor.name,
        encoding=tensor.tensor_type,
        shape=tuple(int(size) for size in reversed(tensor.shape)),
        offset=tensor.data_offset,
        size=tensor.n_bytes,
    )


def _check_encoding(path: Path, encoding: Any) -> None:
    _, block_bytes = GGML_QUANT_SIZES[encoding]
    try:
        dequantize(np.zeros(block_bytes, dtype=np.uint8), encoding)
    except NotImplementedError as exc:
        raise UnsupportedModel(
            f"{path} holds tensors in the encoding {encoding.name}, which TSQP cannot read: use"
            " another quantization."
        ) from exc
