"""Hugging Face directories: config.json and one or many safetensors files."""

import math
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import ModelConfig, tensor_shapes
from tsqp.model.files import BinaryFile, bytes_of, check_shape, parse_json, read_json
from tsqp.model.hf_config import WRAPPERS, from_hf, plain_name

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED = {"I8": torch.int8, "I32": torch.int32, **_DTYPES}


# Nothing real is larger; what is, or is negative, torch refuses with errors of its own.
_Dimension = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[_Dimension]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class SafetensorsFile:
    """One safetensors file: an 8-byte length, a JSON header, then the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.file = BinaryFile(path)
        try:
            self._start, self._entries, self.metadata = _read_header(self.file)
        except CheckpointError:
            self.file.close()
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
        return tuple(self._entry(name).shape)

    def read(
        self, name: str, shape: tuple[int, ...], stored: str = "", rows: slice | None = None
    ) -> Tensor:
        """One tensor, or rows of it, of a checkpoint's dtypes, or of exactly the dtype `stored`."""
        entry = self._entry(name)
        where = str(self.file.path)
        check_shape(where, name, tuple(entry.shape), shape)
        if stored and entry.dtype != stored:
            raise CheckpointError(f"Tensor {name} of {where} is not {stored}: fetch it again.")
        dtype = _STORED[stored] if stored else _DTYPES.get(entry.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"Tensor {name} of {where} has dtype {entry.dtype[:40]!a}, and TSQP reads"
                f" {', '.join(_DTYPES)}."
            )
        begin, end = entry.data_offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
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
    """Where the tensors' bytes start, the entries, which all lie inside the file, and metadata."""
    if file.size < 8:
        raise _corrupt(file)
    length = int.from_bytes(file.read(0, 8), "little")
    start = 8 + length
    if length > MAX_HEADER_BYTES or start > file.size:
        raise _corrupt(file)
    header = parse_json(file.read(8, length), file.path)
    metadata = header.pop("__metadata__", None)
    try:
        entries = msgspec.convert(header, dict[str, _Entry])
        metadata = msgspec.convert(metadata or {}, dict[str, str])
    except msgspec.ValidationError as exc:
        raise _corrupt(file) from exc
    for entry in entries.values():
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= file.size - start:
            raise _corrupt(file)
    return start, entries, metadata


def _corrupt(file: BinaryFile) -> CheckpointError:
    return CheckpointError(f"{file.path} is cut short or not a safetensors file: fetch it again.")


Places = dict[str, tuple[SafetensorsFile, str]]  # the file of a tensor, and its name there


class SafetensorsCheckpoint:
    """A directory as transformers writes it."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        config_path = directory / "config.json"
        if not config_path.is_file():
            raise CheckpointError(
                f"{directory} has no config.json, so it is not a checkpoint directory."
            )
        generation_path = directory / "generation_config.json"
        generation = read_json(generation_path) if generation_path.is_file() else None
        config = read_json(config_path)
        self.config = from_hf(config, generation)
        self.files: dict[str, SafetensorsFile] = {}
        try:
            where = self._locate(directory)
            self._where = {name: (file, name) for name, file in where.items()}
            if config["model_type"] in WRAPPERS:
                self._where = _plain(self._where, self.name)
            _check_places(self._where, self.config, self.name)
        except BaseException:
            self.close()
            raise

    def _locate(self, directory: Path) -> dict[str, SafetensorsFile]:
        """Which file holds each tensor, by the name it has there."""
        single = directory / "model.safetensors"
        if single.is_file():
            file = self._open(single)
            return dict.fromkeys(file.names(), file)
        index_path = directory / "model.safetensors.index.json"
        if not index_path.is_file():
            raise _no_weights(directory)
        where = {}
        for name, shard in _weight_map(index_path).items():
            where[name] = file = self._open(directory / shard)
            if not file.has(name):
                raise CheckpointError(f"{directory / shard} lacks tensor {name[:200]!a}.")
        return where

    def _open(self, path: Path) -> SafetensorsFile:
        if path.name not in self.files:
            if not path.is_file():
                raise CheckpointError(f"The checkpoint lacks its file {path}: fetch it again.")
            self.files[path.name] = SafetensorsFile(path)
        return self.files[path.name]

    @property
    def sources(self) -> dict[str, BinaryFile]:
        """See `checkpoint.Checkpoint`."""
        return {name: file.file for name, (file, _) in self._where.items()}

    def read(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """See `checkpoint.Checkpoint`."""
        if name not in self._where:
            raise CheckpointError(f"{self.name} lacks tensor {name}.")
        file, stored_name = self._where[name]
        return file.read(stored_name, shape, rows=rows)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _plain(where: Places, checkpoint: str) -> Places:
    """The same tensors by the names that they would have in a language model alone."""
    found: Places = {}
    for name, place in where.items():
        plain = plain_name(name)
        if plain in found:
            both = f"{found[plain][1][:200]!a} and {name[:200]!a}"
            raise CheckpointError(
                f"{checkpoint} has tensors {both}, which mean the same weights: remove one."
            )
        found[plain] = place
    return found


def _check_places(where: Places, config: ModelConfig, checkpoint: str) -> None:
    """Refuse tensors of layers that the config leaves out: without them it is another model.

    What is outside the layers may be a part that reads images, or an output projection that the
    config ties to the embedding.
    """
    known = tensor_shapes(config)
    for name in where:
        in_layers = name.startswith("model.layers.") or name == "lm_head.bias"
        # Older checkpoints hold frequencies, which follow from the config.
        if in_layers and name not in known and not name.endswith(".rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{checkpoint} holds tensor {name[:200]!a}, for which its config.json has no"
                " place: fetch both again."
            )


def _weight_map(index_path: Path) -> dict[str, str]:
    try:
        index = msgspec.convert(read_json(index_path), _Index)
    except msgspec.ValidationError as exc:
        raise CheckpointError(f"{index_path} has no valid weight_map: fetch it again.") from exc
    for shard in index.weight_map.values():
        # The index is not trusted: only plain names, so that it cannot point outside.
        if not shard.endswith(".safetensors") or "\0" in shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{index_path} names the file {shard[:200]!a}, which is not a safetensors file"
                " beside it."
            )
    return index.weight_map


def _no_weights(directory: Path) -> CheckpointError:
    if (directory / "pytorch_model.bin").exists() or any(directory.glob("pytorch_model*.bin")):
        return CheckpointError(
            f"{directory} holds pytorch_model.bin only, a pickle file, which TSQP refuses because"
            " loading one can run any code: convert it to safetensors."
        )
    return CheckpointError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json."
    )
