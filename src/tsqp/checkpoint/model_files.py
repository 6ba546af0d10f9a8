"""The small files of a model's folder: config, tokenizer, chat template."""

import hashlib
import re
from pathlib import Path

from tsqp.errors import CheckpointError

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
            self._read[name] = _content(self.folder / name)
        return self._read[name]

    def names(self, folder: str) -> list[str]:
        """The sorted names in a folder below this one, the same on every call.

        Raises:
            CheckpointError: it cannot be read.
        """
        if folder not in self._names:
            path = self.folder / folder
            try:
                found = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
            except OSError as exc:
                raise CheckpointError(f"Cannot read {path}: {exc.strerror}.") from exc
            self._names[folder] = found
        return self._names[folder]

    def sha256(self) -> dict[str, str]:
        """The SHA-256 of every file that was read so far, by name; absent files are left out."""
        return {
            name: hashlib.sha256(content).hexdigest()
            for name, content in sorted(self._read.items())
            if content is not None
        }


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


def _content(path: Path) -> bytes | None:
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise CheckpointError(f"Cannot read {path}: it is not a file.")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise CheckpointError(f"Cannot read {path}: {exc.strerror}.") from exc
    if len(content) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is larger than the {MAX_FILE_BYTES} bytes TSQP accepts.")
    return content
