"""The file operations that quotes need. The kernel, or Gramine, answers them."""

import os
from pathlib import Path


class AttributeFiles:
    """Directories and attributes of a file system whose files are questions and answers.

    An attribute is read as a whole, and written by one call: the kernel takes each write for a
    whole value.
    """

    def make(self, folder: Path) -> None:
        """Make a folder; its attributes appear with it."""
        folder.mkdir()

    def remove(self, folder: Path) -> None:
        """Remove a folder with its attributes."""
        folder.rmdir()

    def read(self, path: Path, limit: int) -> bytes:
        """The whole value of an attribute; of a longer one, at least `limit` + 1 bytes."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts, size = [], 0
            while size <= limit and (part := os.read(file, limit + 1)):
                parts.append(part)
                size += len(part)
            return b"".join(parts)
        finally:
            os.close(file)

    def write(self, path: Path, value: bytes) -> None:
        """Set an attribute that exists. Raises OSError if it took only a part of the value."""
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.write(file, value) != len(value):
                raise OSError(5, "only a part of the value was written")
        finally:
            os.close(file)
