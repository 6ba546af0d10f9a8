"""Encrypts a model: a folder file by file, or a GGUF file."""

import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.encrypted_file import ID_BYTES, EncryptedModel, write_encrypted
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.gguf_file import GGUFCheckpoint
from tsqp.checkpoint.model_key import ModelKey
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.safetensors_file import SafetensorsCheckpoint
from tsqp.errors import CheckpointError, UsageError, printable_path


@dataclass(frozen=True, slots=True)
class _Content:
    """What is encrypted into one file.

    Attributes:
        read: gives bytes, by their offset and number.
    """

    size: int
    read: Callable[[int, int], bytes]

    @classmethod
    def of_file(cls, file: BinaryFile) -> "_Content":
        return cls(file.size, file.read)

    @classmethod
    def of_bytes(cls, content: bytes) -> "_Content":
        return cls(len(content), lambda offset, count: content[offset : offset + count])


def encrypt_model(model: str, out: Path, key: ModelKey, progress: Progress = silent) -> list[str]:
    """Write an encrypted copy of a model, completely or not at all.

    A folder gets the files that TSQP reads, under their names; others are left out.

    Args:
        model: a Hugging Face directory, a .gguf file, or "demo".
        out: a new folder, or a new .gguf file.
        progress: called with the bytes done and their total.

    Returns:
        the names of the files in the folder, or the name of the file.

    Raises:
        UsageError: the path is taken or has another ending, or the model cannot be encrypted.
        CheckpointError: the model cannot be used, or the copy not be written.
    """
    if out.exists():
        raise UsageError(f"{out} exists; name a new folder or file, or remove it.")
    try:
        checkpoint = open_checkpoint(model)
    except EncryptedModel as exc:
        raise UsageError(f"{printable_path(model)} is encrypted already.") from exc
    try:
        match checkpoint:
            case GGUFCheckpoint():
                if out.suffix.lower() != ".gguf":
                    raise UsageError("OUT must end in .gguf, because the model is a GGUF file.")
                contents = {"": _Content.of_file(checkpoint.file)}
            case SafetensorsCheckpoint():
                contents = _folder_contents(checkpoint)
            case _:
                raise UsageError("Random weights are made anew each time; encrypt a model's files.")
        _write(contents, out, key, progress)
    finally:
        checkpoint.close()
    return sorted(name or out.name for name in contents)


def _folder_contents(checkpoint: SafetensorsCheckpoint) -> dict[str, _Content]:
    """Everything that is read of a folder, by name."""
    checkpoint.file_digests()  # reads all small files
    small, large = checkpoint.model_files.contents(), checkpoint.open_files()
    contents = {name: _Content.of_bytes(content) for name, content in small.items()}
    return contents | {name: _Content.of_file(file) for name, file in large.items()}


def _write(contents: dict[str, _Content], out: Path, key: ModelKey, progress: Progress) -> None:
    done = Counter(sum(each.size for each in contents.values()), progress)
    together = secrets.token_bytes(ID_BYTES)
    names = sorted(contents)
    try:
        # Beside its place, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            written = Path(temporary) / "model"
            for name, content in contents.items():
                path = written / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    write_encrypted(
                        file,
                        key,
                        content.read,
                        content.size,
                        name=name,
                        model=together,
                        files=names,
                        done=done,
                    )
            written.rename(out)
    except OSError as exc:
        raise CheckpointError(f"Cannot write {printable_path(out)}: {exc.strerror}.") from exc
