"""Encrypted folders of a model: exactly the files that were encrypted together."""

from contextlib import closing
from functools import cached_property
from pathlib import Path

from tsqp.checkpoint.encrypted_file import EncryptedFile, Header
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.model_files import CONFIG, ModelFiles, check_size
from tsqp.checkpoint.model_key import ModelKey
from tsqp.errors import CheckpointError


class EncryptedFolder(ModelFiles):
    """The files of a folder that `tsqp encrypt` wrote.

    Each of them lists all of them. What the disk has besides is ignored, and what it lacks is an
    error, so that nobody can add a file to the model or take one away.
    """

    def __init__(self, folder: Path, key: ModelKey) -> None:
        super().__init__(folder)
        self._key = key

    @cached_property
    def _header(self) -> Header:
        with closing(EncryptedFile(self.folder / CONFIG, self._key, CONFIG)) as file:
            return file.header

    def has(self, name: str) -> bool:
        return name in self._header.files

    def open(self, name: str) -> BinaryFile:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"The encrypted model lacks its file {path}: fetch it again.")
        file = EncryptedFile(path, self._key, name)
        if file.header.model != self._header.model:
            file.close()
            raise CheckpointError(
                f"{path} was not encrypted together with {self.folder / CONFIG}: fetch the model "
                "again."
            )
        return file

    def _content(self, name: str) -> bytes | None:
        if not self.has(name):
            return None
        with closing(self.open(name)) as file:
            check_size(file.path, file.size)
            return file.read(0, file.size)

    def _listing(self, folder: str) -> list[str]:
        prefix = f"{folder}/"
        return [name.removeprefix(prefix) for name in self._header.files if name.startswith(prefix)]


def model_files(folder: Path, key: ModelKey | None) -> ModelFiles:
    """The files of a model's folder, which are encrypted if there is a key."""
    return ModelFiles(folder) if key is None else EncryptedFolder(folder, key)
