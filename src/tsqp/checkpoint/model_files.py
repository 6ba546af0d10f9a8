"""The small files of a model's folder: config, tokenizer, chat template."""

import hashlib
import re
from pathlib import Path

from tsqp.checkpoint.encrypted_file import check_plain, open_plain
from tsqp.checkpoint.files import BinaryFile
from tsqp.errors import CheckpointError

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES_FOLDER = "additional_chat_templates"
MAX_TEMPLATES = 64
_TEMPLATE = re.compile(r"[\w-]{1,64}\.jinja")
MAX_FILE_BYTES = 64 * 2**20  # the largest tokenizer.json takes half of it


class ModelFiles:
    """Reads each file of a folder once: what is used is what is hashed.

    Later changes of a file on disk have no effect. Not thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, bytes | None] = {}
        self._names: dict[str, list[str]] = {}

    def read(self, name: str) -> bytes | None:
        """The content of the file called `name`, the same on every call; None if it is missing.

        Args:
            name: relative to the folder; chosen by this program, never by a file.

        Raises:
            CheckpointError: it cannot be read, or is larger than MAX_FILE_BYTES.
        """
        if name not in self._read:
            self._read[name] = self._content(name)
        return self._read[name]

    def names(self, folder: str) -> list[str]:
        """The sorted names in a folder below this one, the same on every call.

        Raises:
            CheckpointError: it cannot be read.
        """
        if folder not in self._names:
            self._names[folder] = sorted(self._listing(folder))
        return self._names[folder]

    def has(self, name: str) -> bool:
        """Whether the folder has a file of this name."""
        return (self.folder / name).is_file()

    def open(self, name: str) -> BinaryFile:
        """A large file, which is read piece by piece. The caller closes it.

        Raises:
            CheckpointError: it is missing, or cannot be read.
        """
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"The checkpoint lacks its file {path}: fetch it again.")
        return open_plain(path)

    def contents(self) -> dict[str, bytes]:
        """Every file that was read so far, by name; absent files are left out."""
        return {name: found for name, found in sorted(self._read.items()) if found is not None}

    def sha256(self) -> dict[str, str]:
        """The SHA-256 of these files, by name."""
        return {name: hashlib.sha256(found).hexdigest() for name, found in self.contents().items()}

    def _content(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            if path.exists() and not path.is_file():  # a pipe would block for ever
                raise CheckpointError(f"Cannot read {path}: it is not a file.")
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise CheckpointError(f"Cannot read {path}: {exc.strerror}.") from exc
        check_size(path, len(content))
        check_plain(path, content)
        return content

    def _listing(self, folder: str) -> list[str]:
        path = self.folder / folder
        try:
            return [each.name for each in path.iterdir()] if path.is_dir() else []
        except OSError as exc:
            raise CheckpointError(f"Cannot read {path}: {exc.strerror}.") from exc


def check_size(path: Path, size: int) -> None:
    """Raises CheckpointError if a small file is larger than MAX_FILE_BYTES."""
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is larger than the {MAX_FILE_BYTES} bytes TSQP accepts.")


def read_tokenizer_files(files: ModelFiles) -> None:
    """Read everything that a tokenizer and its chat template can come from, so that it is hashed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for path in (*TOKENIZER_FILES, *additional_templates(files).values()):
        files.read(path)


def additional_templates(files: ModelFiles) -> dict[str, str]:
    """The paths of the chat templates besides the default one, by their names.

    Raises:
        CheckpointError: the folder cannot be read, or holds more than MAX_TEMPLATES.
    """
    names = [name for name in files.names(TEMPLATES_FOLDER) if _TEMPLATE.fullmatch(name)]
    if len(names) > MAX_TEMPLATES:
        folder = files.folder / TEMPLATES_FOLDER
        raise CheckpointError(f"{folder} holds more than {MAX_TEMPLATES} templates.")
    return {name.removesuffix(".jinja"): f"{TEMPLATES_FOLDER}/{name}" for name in names}
