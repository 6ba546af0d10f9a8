"""The header of a GGUF file: its metadata, and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT

from tsqp.checkpoint.files import BinaryFile
from tsqp.errors import CheckpointError, ModelError, UnsupportedModel

READABLE_VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000  # as of safetensors; the largest vocabularies take a tenth
MAX_DIMENSIONS = 4
MAX_ENTRIES = 2**16  # tensors, and keys of the metadata: the largest models have some thousands
MAX_ITEMS = 2**22  # elements of an array: more than ten times the largest vocabulary
WINDOW_BYTES = 2**20  # read at once

_STRING, _ARRAY = 8, 9
# GGUF value type: its layout, little-endian.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies, and how it is encoded.

    Attributes:
        encoding: a `GGMLQuantizationType`.
        shape: as in PyTorch, rows first.
        offset, size: in bytes; the range lies inside the file.
        row_bytes: bytes of one row; of the whole tensor if it has one dimension.
    """

    name: str
    encoding: Any
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def row_bytes(self) -> int:
        return self.size if len(self.shape) == 1 else self.size // self.shape[0]


@dataclass(frozen=True, slots=True, repr=False)
class StringArray:
    """An array of strings, as the file holds it: each is a length of 8 bytes, then UTF-8.

    It is decoded only when it is asked for, because most readers of a header need no vocabulary.
    """

    count: int
    _data: bytes

    def __len__(self) -> int:
        return self.count

    def decode(self) -> list[str]:
        """All strings.

        Raises:
            UnicodeDecodeError: one is not UTF-8.
        """
        data, at, found = self._data, 0, []
        for _ in range(self.count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            found.append(data[start:at].decode())
        return found

    def find(self, wanted: Collection[str]) -> dict[int, str]:
        """The places of the strings that are among `wanted`, with the strings."""
        texts = {text.encode(): text for text in wanted}
        longest = max(map(len, texts), default=0)
        data, at, found = self._data, 0, {}
        length_at = struct.Struct("<Q").unpack_from
        for place in range(self.count):
            start = at + 8
            at = start + length_at(data, at)[0]
            if at - start <= longest and (raw := data[start:at]) in texts:
                found[place] = texts[raw]
        return found


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """The header: everything before the tensors' data.

    Attributes:
        metadata: values by key; arrays of numbers are lists, arrays of strings `StringArray`s.
        tensors: by their GGUF names.
        sha256: hexadecimal SHA-256 of the header's bytes, from which everything here was read.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    sha256: str


def read_header(file: BinaryFile) -> GGUFHeader:
    """Read the header's bytes once, and check them.

    Raises:
        UnsupportedModel: a version, byte order or encoding that cannot be read.
        CheckpointError: cut short, or not a GGUF file.
    """
    _check_version(file)
    try:
        return _read(_Bytes(file))
    except ModelError:
        raise
    except (EOFError, KeyError, ValueError, OverflowError) as exc:  # what _read raises
        raise CheckpointError(
            f"{file.path} is cut short or corrupt: fetch it again ({type(exc).__name__})."
        ) from exc


class _Bytes:
    """The header's bytes, read from the file into private memory as far as they are needed."""

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._data = bytearray()
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            EOFError: the file ends first, or the header is longer than MAX_HEADER_BYTES.
        """
        start, end = self.position, self.position + count
        if end > len(self._data):
            self._read_up_to(end)
        self.position = end
        return bytes(self._data[start:end])

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.take(self.uint(8)).decode()

    def strings(self, count: int) -> StringArray:
        """`count` strings, not decoded yet."""
        start = at = self.position
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(self._data):
                self._read_up_to(at + 8)
            at += 8 + length_at(self._data, at)[0]
            if at > self._end:
                raise EOFError
        self.position = start
        return StringArray(count, self.take(at - start))

    def sha256(self) -> str:
        """The SHA-256 of everything before the current position."""
        return hashlib.sha256(memoryview(self._data)[: self.position]).hexdigest()

    def _read_up_to(self, end: int) -> None:
        if end > self._end:
            raise EOFError
        have = len(self._data)
        self._data += self.file.read(have, min(max(end - have, WINDOW_BYTES), self._end - have))


def _read(data: _Bytes) -> GGUFHeader:
    data.take(8)  # the magic number and the version, which have been checked
    tensor_count, value_count = data.uint(8), data.uint(8)
    if max(tensor_count, value_count) > MAX_ENTRIES:
        raise ValueError("entries")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = data.string()
        if key in metadata:
            raise KeyError("metadata")
        metadata[key] = _value(data, data.uint(4))
    infos = [_tensor_info(data) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError("alignment")
    data_start = -(-data.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, encoding, shape, offset in infos:
        if name in tensors:
            raise KeyError("tensors")
        tensors[name] = _stored(name, encoding, shape, data_start + offset)
    if any(tensor.offset + tensor.size > data.file.size for tensor in tensors.values()):
        raise EOFError
    for encoding in {tensor.encoding for tensor in tensors.values()}:
        _check_encoding(data.file.path, encoding)
    return GGUFHeader(metadata, tensors, data.sha256())


def _value(data: _Bytes, kind: int) -> Any:
    if kind == _STRING:
        return data.string()
    if kind == _ARRAY:
        item_kind, count = data.uint(4), data.uint(8)
        if count > MAX_ITEMS:
            raise ValueError("items")
        if item_kind == _STRING:
            return data.strings(count)
        return _numbers(data, item_kind, count).tolist()  # KeyError for an array of arrays
    return _numbers(data, kind, 1)[0].item()


def _numbers(data: _Bytes, kind: int, count: int) -> Any:
    dtype = np.dtype(_SCALARS[kind])
    if kind == 7:  # numpy must not see a byte that is neither 0 nor 1
        return np.frombuffer(data.take(count), np.uint8) != 0
    return np.frombuffer(data.take(count * dtype.itemsize), dtype)


def _tensor_info(data: _Bytes) -> tuple[str, int, tuple[int, ...], int]:
    """Name, encoding, shape with rows first, and offset in the data section."""
    name = data.string()
    dimensions = data.uint(4)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError("dimensions")
    sizes = [data.uint(8) for _ in range(dimensions)]
    return name, data.uint(4), tuple(reversed(sizes)), data.uint(8)


def _check_version(file: BinaryFile) -> None:
    start = file.read(0, 8) if file.size >= 8 else b""
    if not start.startswith(b"GGUF"):
        raise CheckpointError(f"{file.path} is not a GGUF file: fetch it again.")
    if int.from_bytes(start[4:], "big") in READABLE_VERSIONS:
        raise UnsupportedModel(
            f"{file.path} is a big-endian GGUF file, which TSQP does not read: use a little-endian"
            " file of the model."
        )
    version = int.from_bytes(start[4:], "little")
    if version not in READABLE_VERSIONS:
        raise UnsupportedModel(f"{file.path} has GGUF version {version}, but TSQP reads 2 and 3.")


def _stored(name: str, encoding: int, shape: tuple[int, ...], offset: int) -> StoredTensor:
    if encoding not in set(GGMLQuantizationType):
        raise UnsupportedModel(
            f"Tensor {name[:200]!a} of the GGUF file has the unknown encoding"
            f" {encoding}, which TSQP cannot read: use another quantization."
        )
    kind = GGMLQuantizationType(encoding)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError("shape")
    return StoredTensor(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def _check_encoding(path: Path, encoding: Any) -> None:
    _, block_bytes = GGML_QUANT_SIZES[encoding]
    try:
        dequantize(np.zeros(block_bytes, dtype=np.uint8), encoding)
    except NotImplementedError as exc:
        raise UnsupportedModel(
            f"{path} holds tensors in the encoding {encoding.name}, which TSQP cannot read: use"
            " another quantization."
        ) from exc
