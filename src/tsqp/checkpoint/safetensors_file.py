"""Hugging Face directories: config.json and one or many safetensors files."""

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from tsqp.checkpoint.files import BinaryFile, bytes_of, check_shape, parse_json
from tsqp.checkpoint.model_files import CONFIG, ModelFiles, read_tokenizer_files
from tsqp.checkpoint.tensor_places import find_tensors
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.hf_config import WRAPPERS, from_hf

# The format allows 100 MB. A file of 100,000 tensors has a header of 15 MB, and reading a header
# may take ten times its size.
MAX_HEADER_BYTES = 2**25

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"F64": torch.float64}  # which every use rounds, as transformers does
_STORED = {
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    **_DTYPES,
}


# Nothing real is larger; what is, or is negative, torch refuses with errors of its own.
_Dimension = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Written(msgspec.Struct):
    """An entry of a header, or its metadata, whose values are all texts.

    It is decoded with these types, so that the first value of another type ends it: as Python
    objects, 100 bytes of JSON may take thousands.
    """

    dtype: str = ""
    shape: list[_Dimension] | str = ""
    data_offsets: tuple[int, int] | str = ""


class _Metadata(msgspec.Struct):
    texts: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class SafetensorsFile:
    """One safetensors file: an 8-byte length, a JSON header, then the tensors' bytes."""

    def __init__(self, file: BinaryFile) -> None:
        """Read the header. The file is closed with this object, and after an error."""
        self.file = file
        try:
            self._start, self._entries, self.metadata = _read_header(file)
        except CheckpointError:
            file.close()
            raise

    def names(self) -> list[str]:
        return list(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.file.size - self._start

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(
        self, name: str, shape: tuple[int, ...], stored: str = "", rows: slice | None = None
    ) -> Tensor:
        """One tensor, or rows of it. Its dtype is a checkpoint's, or exactly `stored` if given."""
        entry = self._entry(name)
        where = str(self.file.path)
        check_shape(where, name, entry.shape, shape)
        if stored and entry.dtype != stored:
            raise CheckpointError(f"Tensor {name} of {where} is not {stored}: fetch it again.")
        dtype = _STORED[stored] if stored else _DTYPES.get(entry.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"Tensor {name} of {where} has dtype {entry.dtype[:40]!a}, but TSQP reads"
                f" {', '.join(_DTYPES)}."
            )
        begin = entry.begin
        if entry.end - begin != math.prod(shape) * dtype.itemsize:
            raise _corrupt(self.file)
        if rows is not None:
            begin += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (rows.stop - rows.start, *shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        self.file.read_into(self._start + begin, bytes_of(tensor))
        return tensor

    def close(self) -> None:
        self.file.close()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.file.path} lacks tensor {name}.")
        return entry


def _read_header(file: BinaryFile) -> tuple[int, dict[str, _Entry], dict[str, str]]:
    """The offset of the tensors' bytes, the entries (all inside the file), and the metadata."""
    if file.size < 8:
        raise _corrupt(file)
    length = int.from_bytes(file.read(0, 8), "little")
    start = 8 + length
    if length > MAX_HEADER_BYTES or start > file.size:
        raise _corrupt(file)
    text = file.read(8, length)
    try:
        metadata = msgspec.json.decode(text, type=_Metadata).texts
        written = msgspec.json.decode(text, type=dict[str, _Written])
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise _corrupt(file) from exc
    written.pop("__metadata__", None)
    entries = {name: _checked(file, each, start) for name, each in written.items()}
    return start, entries, metadata


def _checked(file: BinaryFile, written: _Written, start: int) -> _Entry:
    shape, offsets = written.shape, written.data_offsets
    if isinstance(shape, str) or isinstance(offsets, str):
        raise _corrupt(file)
    begin, end = offsets
    if not 0 <= begin <= end <= file.size - start:
        raise _corrupt(file)
    return _Entry(written.dtype, tuple(shape), begin, end)


def _corrupt(file: BinaryFile) -> CheckpointError:
    return CheckpointError(f"{file.path} is cut short or not a safetensors file: fetch it again.")


GENERATION_CONFIG = "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """A directory as transformers writes it."""

    def __init__(self, directory: Path, files: ModelFiles | None = None) -> None:
        """Args: files: the files of the directory, if the caller reads them too."""
        self.name = str(directory)
        self.model_files = ModelFiles(directory) if files is None else files
        text = self.model_files.read(CONFIG)
        if text is None:
            raise CheckpointError(
                f"{directory} has no config.json, so it is not a checkpoint directory."
            )
        config = parse_json(text, directory / CONFIG)
        if config.get("transformers_weights") is not None:
            raise UnsupportedModel(
                f"{directory / CONFIG} names the file of the weights (transformers_weights), but"
                f" TSQP reads only {WEIGHTS} or {INDEX}: rename it."
            )
        self.config = from_hf(config, self._generation_config())
        self._files: dict[str, SafetensorsFile] = {}
        try:
            where = self._locate(directory)
            names, self.config = find_tensors(
                where, self.config, self.name, is_wrapper=config["model_type"] in WRAPPERS
            )
            self._where = {name: (where[stored], stored) for name, stored in names.items()}
        except BaseException:
            self.close()
            raise

    def _generation_config(self) -> dict[str, Any] | None:
        text = self.model_files.read(GENERATION_CONFIG)
        if text is None or not text.strip():  # an empty one counts as absent in transformers too
            return None
        return parse_json(text, self.model_files.folder / GENERATION_CONFIG)

    def _locate(self, directory: Path) -> dict[str, SafetensorsFile]:
        """Which file holds each tensor, by the name it has there."""
        if self.model_files.has(WEIGHTS):
            file = self._open(WEIGHTS)
            return dict.fromkeys(file.names(), file)
        text = self.model_files.read(INDEX)
        if text is None:
            raise _no_weights(directory)
        weight_map = _weight_map(text, directory / INDEX)
        where: dict[str, SafetensorsFile] = {}
        # Tensors of a shard that the index does not list count too, as in transformers.
        for shard in sorted(set(weight_map.values())):
            file = self._open(shard)
            for name in file.names():
                if name in where:
                    raise CheckpointError(
                        f"Both {where[name].file.path} and {file.file.path} hold tensor"
                        f" {name[:200]!a}: fetch the checkpoint again."
                    )
                where[name] = file
        for name, shard in weight_map.items():
            if not self._files[shard].has(name):
                raise CheckpointError(f"{directory / shard} lacks tensor {name[:200]!a}.")
        return where

    def _open(self, name: str) -> SafetensorsFile:
        file = self._files[name] = SafetensorsFile(self.model_files.open(name))
        return file

    @property
    def sources(self) -> dict[str, BinaryFile]:
        """See `checkpoint.Checkpoint`."""
        return {name: file.file for name, (file, _) in self._where.items()}

    def open_files(self) -> dict[str, BinaryFile]:
        """The files of the tensors, by their names in the folder."""
        return {name: each.file for name, each in self._files.items()}

    def file_digests(self) -> dict[str, str]:
        """See `checkpoint.Checkpoint`; the index says only where tensors lie, and is left out."""
        read_tokenizer_files(self.model_files)
        return {k: v for k, v in self.model_files.sha256().items() if k != INDEX}

    def read(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """See `checkpoint.Checkpoint`."""
        if name not in self._where:
            raise CheckpointError(f"{self.name} lacks tensor {name}.")
        file, stored_name = self._where[name]
        return file.read(stored_name, shape, rows=rows)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _weight_map(text: bytes, path: Path) -> dict[str, str]:
    try:
        index = msgspec.json.decode(text, type=_Index)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} has no valid weight_map: fetch it again.") from exc
    for shard in index.weight_map.values():
        if not shard.endswith(".safetensors") or not _is_inside(shard):
            raise CheckpointError(
                f"{path} names the file {shard[:200]!a}, which is not a safetensors file in the"
                " same folder or below it."
            )
    return index.weight_map


def _is_inside(name: str) -> bool:
    """Whether a name from an index, which is not trusted, leads to a file below its folder."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _no_weights(directory: Path) -> CheckpointError:
    if (directory / "pytorch_model.bin").exists() or any(directory.glob("pytorch_model*.bin")):
        return CheckpointError(
            f"{directory} holds pytorch_model.bin only, a pickle file, which TSQP refuses because"
            " loading one can run any code: convert it to safetensors."
        )
    return CheckpointError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json."
    )
