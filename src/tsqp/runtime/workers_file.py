"""`--workers-file`: the workers of a run, one a line, read again when the file changes.

# name  endpoint             public key, or the file that holds it
gpu-1   tcp://10.0.0.1:7000  rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tsqp.errors import UsageError, printable_path
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.keys import parse_public_key

log = logging.getLogger("tsqp")

MAX_BYTES = 2**20
MAX_WORKERS = 1024


class Entry(NamedTuple):
    """One worker. The key is None for a link that is not encrypted."""

    name: str
    endpoint: str
    key: str | None


def read_workers_file(path: Path) -> list[Entry]:
    """Read all workers.

    Raises:
        UsageError: the file cannot be read, or a line is wrong; the message has its number.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except OSError as exc:
        raise UsageError(f"Cannot read {printable_path(path)}: {exc.strerror}.") from exc
    except UnicodeDecodeError:
        raise UsageError(f"{printable_path(path)} is not text in UTF-8.") from None
    name = printable_path(path)
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name} has more than {MAX_BYTES} bytes; name fewer workers.")
    return _parse(text, name)


class WorkersFile:
    """The file of a run that goes on.

    While the file cannot be used, the last workers stay, and the log says why once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None

    def changed(self) -> list[Entry] | None:
        """The workers, if the file was changed since the last call and can be used."""
        stamp: tuple[int, ...] = ()
        with suppress(OSError):
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            return read_workers_file(self._path)
        except UsageError as error:
            self.refuse(error)
            return None

    def refuse(self, error: UsageError) -> None:
        """Say why the workers stay as they are."""
        log.warning("the workers stay as they are: %s", str(error))


def _parse(text: str, name: str) -> list[Entry]:
    if text and not text.endswith("\n"):
        raise UsageError(
            f"Line {text.count(chr(10)) + 1} of {name} has no end, so the file may be half "
            "written; write a new file, and rename it."
        )
    found: list[Entry] = []
    seen: dict[tuple[str, str], int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            entry = _entry(words)
        except UsageError as exc:
            raise UsageError(f"Line {number} of {name}: {exc}") from exc
        for what, value in zip(("name", "endpoint", "key"), entry, strict=True):
            if value is not None and (first := seen.setdefault((what, value), number)) != number:
                raise UsageError(f"Line {number} of {name} has the {what} of line {first}.")
        found.append(entry)
    if not found:
        raise UsageError(f"{name} names no worker; write one a line: NAME ENDPOINT [KEY].")
    if len(found) > MAX_WORKERS:
        raise UsageError(f"{name} names more than {MAX_WORKERS} workers.")
    return found


def _entry(words: list[str]) -> Entry:
    if len(words) not in (2, 3):
        raise UsageError("a line is NAME ENDPOINT [KEY].")
    endpoint = parse_endpoint(words[1])
    if endpoint.scheme not in ("ipc", "tcp"):
        raise UsageError("an endpoint is ipc:///PATH or tcp://HOST:PORT.")
    key = parse_public_key(words[2]) if len(words) == 3 else None
    return Entry(words[0], str(endpoint), key)
