"""Tensors in memory shared between two processes of one machine.

The worker creates a segment, the TEE maps it, the worker unlinks it at once; from then on it lives
exactly as long as the two processes. `multiprocessing.shared_memory` is not used: it starts a
helper process, which inside an enclave would be another enclave.

Nothing here is trusted by the TEE. Offsets and shapes come from the TEE's own books; contents can
change at any moment; a worker that truncates the segment kills the TEE process with SIGBUS, which
is a denial of service and nothing more.
"""

import mmap
import os
import secrets
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tsqp.checkpoint.memory import available_bytes
from tsqp.errors import ProtocolError, WorkerUnavailable

SHM_FOLDER = Path("/dev/shm")
ALIGNMENT = 64  # a cache line
MIN_SEGMENT = 256 * 1024
MAX_VIEWS = 1024  # kept, as the same few calls come again and again


class Segment:
    """A mapped segment; tensors are views into it."""

    def __init__(self, path: Path, size: int, mapping: mmap.mmap) -> None:
        self.path = path
        self.size = size
        self._mapping: mmap.mmap | None = mapping
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    @classmethod
    def create(cls, size: int, folder: Path = SHM_FOLDER) -> "Segment":
        """Create and map a segment of at most `size` bytes, less where the folder is small.

        Raises:
            WorkerUnavailable: there is no room or no right to make one; says which.
        """
        path = folder / f"tsqp-{secrets.token_hex(16)}"
        try:
            # Half of what is free: other sessions, and other programs, need some too.
            size = min(size, free_bytes(folder) // 2) // mmap.PAGESIZE * mmap.PAGESIZE
            if size < MIN_SEGMENT:
                raise WorkerUnavailable(
                    f"no segment in {folder}: it would have {size} bytes, and {MIN_SEGMENT} "
                    "are needed"
                )
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
                return cls(path, size, mmap.mmap(descriptor, size))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise WorkerUnavailable(f"no segment in {folder}: {exc.strerror}") from exc

    @classmethod
    def open(cls, name: str, size: int, folder: Path = SHM_FOLDER) -> "Segment":
        """Map a segment that a worker made.

        Inside Gramine the file is a device whose length reads as zero, so the length is `size`.

        Raises:
            WorkerUnavailable: it cannot be opened or is too short.
        """
        path = folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            raise WorkerUnavailable(
                f"the worker's segment is not in this side's {folder} ({exc.strerror})"
            ) from exc
        try:
            length = os.fstat(descriptor).st_size
            if 0 < length < size:
                raise WorkerUnavailable(f"the worker's segment has {length} bytes, not {size}")
            return cls(path, size, mmap.mmap(descriptor, size))
        except (OSError, ValueError) as exc:
            raise WorkerUnavailable(f"the worker's segment cannot be mapped: {exc}") from exc
        finally:
            os.close(descriptor)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of `shape` at byte `offset`.

        Raises:
            ProtocolError: it would not lie wholly inside the segment, or is not aligned.
        """
        key = (offset, shape, dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            view = self._views[key] = self._make_view(offset, shape, dtype)
        return view

    def _make_view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = prod(shape)
        if offset % ALIGNMENT or offset < 0 or offset + count * dtype.itemsize > self.size:
            raise ProtocolError(
                f"A tensor of {count * dtype.itemsize} bytes at {offset} does not lie inside "
                f"the shared segment of {self.size} bytes."
            )
        if self._mapping is None:
            raise ProtocolError("The shared segment is closed.")
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset).view(shape)

    def memory(self, length: int) -> memoryview:
        """The first `length` bytes themselves."""
        assert self._mapping is not None
        return memoryview(self._mapping)[:length]

    def read(self, length: int) -> bytes:
        """A copy of the last `length` bytes."""
        assert self._mapping is not None
        return self._mapping[self.size - length :]

    def write(self, data: bytes) -> None:
        """Write `data` at the end."""
        assert self._mapping is not None
        self._mapping[self.size - len(data) :] = data

    def unlink(self) -> None:
        """Remove the name; the memory stays while anyone maps it."""
        with suppress(OSError):  # gone already, or out of reach: nothing is left to do
            self.path.unlink()

    def close(self) -> None:
        """Unlink and unmap; views that are still alive keep the mapping until they die."""
        self.unlink()
        self._views.clear()
        self._mapping = None


def free_bytes(folder: Path = SHM_FOLDER) -> int:
    """Bytes for segments that are free in `folder` and in memory.

    Raises:
        WorkerUnavailable: there is no such folder.
    """
    try:
        folder_size = os.statvfs(folder)
    except OSError as exc:
        raise WorkerUnavailable(f"no segment in {folder}: {exc.strerror}") from exc
    return min(folder_size.f_bavail * folder_size.f_frsize, available_bytes())


class Arena:
    """First-fit allocation of byte ranges in a segment, always at the lowest free place.

    A handful of ranges are in use at a time, so a sorted list is enough; the lowest place first
    keeps the same few pages warm in the cache.
    """

    def __init__(self, size: int, start: int = 0) -> None:
        """Ranges lie in [start, size)."""
        self.size = size - start
        self._start = -(-start // ALIGNMENT) * ALIGNMENT
        self._end = size
        self._used: list[tuple[int, int]] = []

    def take(self, length: int) -> int | None:
        """The offset of `length` free bytes, or None where there is no such room."""
        length = max(ALIGNMENT, -(-length // ALIGNMENT) * ALIGNMENT)
        start = self._start
        for place, (used, end) in enumerate(self._used):
            if start + length <= used:
                self._used.insert(place, (start, start + length))
                return start
            start = end
        if start + length > self._end:
            return None
        self._used.append((start, start + length))
        return start

    def give_back(self, offset: int) -> None:
        """Free the range that starts at `offset`."""
        for place, (used, _) in enumerate(self._used):
            if used == offset:
                del self._used[place]
                return
        raise AssertionError(f"nothing was taken at {offset}")
