"""Writes the files of a report; never overwrites a file."""

from pathlib import Path

from tsqp.errors import UsageError


def write_new_file(path: Path, text: str) -> None:
    """Write `text` to a new file.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as exc:
        raise UsageError(f"{path} exists; name a new file, or remove it.") from exc
    except OSError as exc:
        raise UsageError(f"Cannot write {path}: {exc.strerror}.") from exc
