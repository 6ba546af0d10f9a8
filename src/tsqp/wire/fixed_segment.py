"""Shared memory at a fixed place, which both sides are told with `--shm-name`.

Gramine opens only the files that a manifest lists, and a virtual machine sees the memory of an
ivshmem device as a file. So the TEE opens the path that it was started with, and nothing that a
worker names. The worker only says how many bytes of it a session has.

The place is a name in /dev/shm or an absolute path. The worker makes the file of a name for each
session, and removes the name when the TEE has mapped it. A path belongs to somebody else, such as
QEMU: it is neither made nor removed, and serves one session at a time.
"""

import fcntl
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tsqp.errors import UsageError, WorkerUnavailable
from tsqp.wire.messages import FixedRef
from tsqp.wire.shm import (
    SHM_FOLDER,
    Segment,
    free_bytes,
    map_file,
    open_file,
    room_for,
    whole_pages,
)

# A worker removes what a killed one left at the name, so the name must be one of ours.
NAME = re.compile(r"tsqp[A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True, slots=True)
class FixedPlace:
    """Where the memory is.

    Attributes:
        is_name: whether the worker makes the file for each session.
    """

    path: Path
    is_name: bool

    def __str__(self) -> str:
        """The value of --shm-name."""
        return self.path.name if self.is_name else str(self.path)


def parse_place(name: str, folder: Path = SHM_FOLDER) -> FixedPlace:
    """Parse the value of --shm-name.

    Raises:
        UsageError: it is neither a name that begins with tsqp nor an absolute path.
    """
    if NAME.fullmatch(name):
        return FixedPlace(folder / name, is_name=True)
    if name.startswith("/") and name.isprintable() and ".." not in Path(name).parts:
        return FixedPlace(Path(name), is_name=False)
    raise UsageError(
        "--shm-name takes a name in /dev/shm that begins with tsqp, of letters, digits, '.', '_' "
        "and '-', or the absolute path of a file or device."
    )


class FixedSegment(Segment):
    """A segment at a fixed place. On the worker's side it holds a lock on the file."""

    _file: int | None = None  # on the worker's side, while it is in use
    _name: Path | None = None  # to be removed

    @classmethod
    def make(cls, place: FixedPlace, size: int) -> "FixedSegment":
        """On the worker's side: map a segment of `size` bytes, or fewer if there is less room.

        Raises:
            WorkerUnavailable: another session uses the place, or there is no room or permission.
        """
        try:
            if place.is_name:
                return cls._create(place.path, size)
            return cls._borrow(place.path, size)
        except OSError as exc:
            raise WorkerUnavailable(f"no segment at {place.path}: {exc.strerror}") from exc

    @classmethod
    def open(cls, path: Path, size: int) -> "FixedSegment":
        """On the trusted side: map the first `size` bytes at `path`.

        Raises:
            WorkerUnavailable: it cannot be opened or is too short.
        """
        try:
            descriptor = open_file(path)
        except OSError as exc:
            raise WorkerUnavailable(f"this side cannot open {path} ({exc.strerror})") from exc
        try:
            return cls(size, map_file(descriptor, size))
        finally:
            os.close(descriptor)

    @classmethod
    def _create(cls, path: Path, size: int) -> "FixedSegment":
        size = room_for(size, free_bytes(path.parent), f"no segment at {path}")
        # The file gets its name when it is complete and locked, so a file without a lock is stale.
        file = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            _lock(file, path)
            os.posix_fallocate(file, 0, size)
            segment = cls(size, map_file(file, size))
            _link(file, path)
        except BaseException:
            os.close(file)
            raise
        segment._file, segment._name = file, path
        return segment

    @classmethod
    def _borrow(cls, path: Path, size: int) -> "FixedSegment":
        file = open_file(path)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise WorkerUnavailable(f"no segment at {path}: it is not a file")
            _lock(file, path)
            size = whole_pages(min(size, status.st_size), f"no segment at {path}")
            segment = cls(size, map_file(file, size))
            segment._file = file
        except BaseException:
            os.close(file)
            raise
        # An earlier session's data is not for the next one, and mailboxes must be zero at first.
        segment.tensor(0, (size,), torch.uint8).zero_()
        return segment

    @property
    def ref(self) -> FixedRef:
        """What a peer needs to know."""
        return FixedRef(self.size)

    def withdraw(self) -> None:
        if self._name is not None:
            with suppress(OSError):  # already removed, or out of reach
                self._name.unlink()
            self._name = None

    def close(self) -> None:
        super().close()
        if self._file is not None:
            # Python's mapping holds a duplicate, which would keep the lock while a view exists.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkerUnavailable(f"no segment at {path}: another session uses it") from None


def _link(file: int, path: Path) -> None:
    """Give a name to a file that has none."""
    # With a src_dir_fd, which an absolute path makes meaningless, Python follows the link in /proc.
    source = f"/proc/self/fd/{file:d}"
    try:
        os.link(source, path, src_dir_fd=file, follow_symlinks=True)
    except FileExistsError:
        _remove_stale(path)
        os.link(source, path, src_dir_fd=file, follow_symlinks=True)


def _remove_stale(path: Path) -> None:
    """Remove the file of a worker that was killed.

    Raises:
        WorkerUnavailable: a session uses it, or it is something else.
    """
    file = open_file(path)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise WorkerUnavailable(f"no segment at {path}: something else has this name")
        _lock(file, path)
        if os.path.samestat(path.lstat(), status):  # or another worker has just removed it
            path.unlink()
    finally:
        os.close(file)
