"""Sources of weights: one interface for four kinds of source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tsqp.checkpoint import demo_model
from tsqp.checkpoint.encrypted_folder import model_files
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.gguf_file import GGUFCheckpoint
from tsqp.checkpoint.model_files import ModelFiles
from tsqp.checkpoint.model_key import ModelKey
from tsqp.checkpoint.random_weights import RandomCheckpoint
from tsqp.checkpoint.safetensors_file import SafetensorsCheckpoint
from tsqp.errors import CheckpointError, printable_path
from tsqp.model.config import ModelConfig


class Checkpoint(Protocol):
    """Tensors under their Hugging Face names, each read when it is asked for."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def name(self) -> str:
        """The model's name for logs and messages."""
        ...

    @property
    def sources(self) -> Mapping[str, BinaryFile]:
        """The open file that holds each tensor; empty if weights do not come from files."""
        ...

    def file_digests(self) -> dict[str, str]:
        """The SHA-256 of each file that is used besides the tensors, by its name.

        For a directory, the config and tokenizer files; for a GGUF file, its header; for random
        weights, their name.

        Raises:
            CheckpointError: a file cannot be read.
        """
        ...

    def read(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """One tensor in private memory, floating point.

        Safetensors keep the dtype they are stored in; GGUF and random weights are float32.
        May be called from several threads.

        Args:
            shape: shape of the whole tensor.
            rows: the range START:STOP of the first dimension to read; None for all.

        Raises:
            CheckpointError: there is no such tensor, it is cut short, or has another shape.
        """
        ...

    def close(self) -> None:
        """Release files; safe to call twice."""
        ...


def open_checkpoint(
    model: str, files: ModelFiles | None = None, key: ModelKey | None = None
) -> Checkpoint:
    """Open "demo", "random:NAME[:SEED]", a .gguf file, or a Hugging Face directory.

    Args:
        files: the files of a directory, if the tokenizer reads them too.
        key: of an encrypted model.

    Raises:
        UnsupportedModel: a kind of model that TSQP does not implement.
        CheckpointError: something is missing, cut short, or contradicts the config.
    """
    if key is not None and _is_built_in(model):
        raise CheckpointError(f"{model} is not encrypted: leave --model-key-file out.")
    if model == "demo":
        return GGUFCheckpoint(demo_model.locate())
    if model.startswith("random:"):
        return RandomCheckpoint.parse(model)
    path = Path(model).expanduser()
    try:
        _check_path(path)
        return _open_path(path, files, key)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def check_exists(model: str) -> None:
    """Check that there is a file or folder of this name, without opening it.

    Raises:
        CheckpointError: there is none.
    """
    if _is_built_in(model):
        return
    path = Path(model).expanduser()
    try:
        _check_path(path)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _is_built_in(model: str) -> bool:
    return model == "demo" or model.startswith("random:")


def _open_path(path: Path, files: ModelFiles | None, key: ModelKey | None) -> Checkpoint:
    if path.is_dir():
        return SafetensorsCheckpoint(path, model_files(path, key) if files is None else files)
    if path.name.endswith(".tsqp.safetensors"):
        raise CheckpointError(
            f"{path} is a prepared file, which only a worker of the private modes can use: give "
            "the model that it was made from."
        )
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is not a .gguf file: give a directory with config.json, or a .gguf file."
        )
    return GGUFCheckpoint(path, key)


def _check_path(path: Path) -> None:
    if not path.is_dir() and not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint at {printable_path(path, 'that path')}: give a directory, a "
            ".gguf file, random:NAME or demo."
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"Cannot read {printable_path(path)}: {error.strerror}.")
