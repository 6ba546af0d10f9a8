"""Large files that are written completely or not at all, even if the writing process is killed."""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.part\Z", re.DOTALL)


@contextmanager
def new_file(path: Path, ending: str) -> Iterator[BinaryIO]:
    """A file to write, which gets the name `path` when the block ends without an exception.

    Until then it has a temporary name in the same folder and is locked. The lock shows others that
    its writer is alive. Temporary files that dead writers have left in the folder are removed.

    Args:
        ending: the ending of `path` and of all files of this kind.

    Raises:
        OSError: the file cannot be written.
    """
    _remove_abandoned(path.parent, ending)
    with _locked_temporary(path) as (file, temporary):
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def _remove_abandoned(folder: Path, ending: str) -> None:
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            name = _TEMPORARY.match(entry.name)
            if name is not None and name["name"].endswith(ending):
                with suppress(OSError):  # locked, gone by now, or where files cannot be locked
                    _remove_if_abandoned(entry)


def _remove_if_abandoned(path: Path) -> None:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def _locked_temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        with temporary.open("xb") as file:
            with suppress(OSError):  # a file system without locks; there nothing is removed either
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if temporary.exists():  # somebody may have taken it for abandoned before the lock
                    yield file, temporary
                    return
            finally:
                temporary.unlink(missing_ok=True)
