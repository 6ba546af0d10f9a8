"""Tensors in memory that two processes of one machine share.

The worker makes a segment and the TEE maps it. If possible, the segment is a sealed memfd. It has
no name, the TEE opens it through /proc, and nobody can shrink it, so neither side can kill the
other with SIGBUS. Otherwise it is a file in /dev/shm, which the worker unlinks as soon as the TEE
has mapped it. Both kinds are freed when the two processes end. A third kind, for enclaves and
virtual machines, is in `tsqp.wire.fixed_segment`.

`multiprocessing.shared_memory` is not used, because it starts a helper process. In an enclave, that
would be another enclave.

The TEE does not trust shared memory. Offsets and shapes come from the TEE's own records, and
contents may change at any time. A worker that truncates a segment with a name kills the TEE process
with SIGBUS, which is only a denial of service.
"""

import fcntl
import mmap
import os
import secrets
import stat
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tsqp.checkpoint.memory import available_bytes
from tsqp.errors import ProtocolError, WorkerUnavailable
from tsqp.wire.messages import SealedRef, SegmentRef

SHM_FOLDER = Path("/dev/shm")
PROCESSES = Path("/proc")
ALIGNMENT = 64  # a cache line
MIN_SEGMENT = 256 * 1024
MAX_VIEWS = 1024  # cached, because the same few calls repeat


class Segment:
    """A mapped segment. Tensors are views into it."""

    def __init__(self, size: int, mapping: mmap.mmap) -> None:
        self.size = size
        self._mapping: mmap.mmap | None = mapping
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of `shape` at byte `offset`.

        Raises:
            ProtocolError: the view would not fit in the segment, or is not aligned.
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
        """A view of the first `length` bytes."""
        assert self._mapping is not None
        return memoryview(self._mapping)[:length]

    def read(self, length: int) -> bytes:
        """Return a copy of the last `length` bytes."""
        assert self._mapping is not None
        return self._mapping[self.size - length :]

    def write(self, data: bytes) -> None:
        """Write `data` to the last bytes of the segment."""
        assert self._mapping is not None
        self._mapping[self.size - len(data) :] = data

    def withdraw(self) -> None:
        """End the offer: remove the name, or close the offered descriptor.

        The memory stays as long as a process maps it. During this time Python's mmap holds another
        descriptor, through which processes of the same user can open sealed memory.
        """

    def close(self) -> None:
        """Withdraw and unmap. Views that still exist keep the mapping alive."""
        self.withdraw()
        self._views.clear()
        self._mapping = None


class SealedSegment(Segment):
    """A sealed memfd (Linux): a segment without a name, whose size nobody can change."""

    def __init__(self, size: int, mapping: mmap.mmap, descriptor: int | None = None) -> None:
        super().__init__(size, mapping)
        self._descriptor = descriptor  # while it is offered

    @classmethod
    def create(cls, size: int) -> "SealedSegment":
        """Create and map a segment of `size` bytes, or fewer if memory is short.

        Raises:
            WorkerUnavailable: there is no room, or this system cannot seal memory.
        """
        size = room_for(size, free_bytes(None), "no sealed memory")
        if not hasattr(os, "memfd_create"):
            raise WorkerUnavailable("no sealed memory: this system has none")
        try:
            descriptor = os.memfd_create("tsqp-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.posix_fallocate(descriptor, 0, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
                return cls(size, mmap.mmap(descriptor, size), descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as exc:
            raise WorkerUnavailable(f"no sealed memory: {exc.strerror}") from exc

    @classmethod
    def open(cls, pid: int, descriptor: int, size: int) -> "SealedSegment":
        """Map the segment that is open as `descriptor` in process `pid`.

        The worker may name any file, so a file is opened only once it is known to be memory. A pipe
        could block, and a device could have side effects.

        Raises:
            WorkerUnavailable: it cannot be opened, is not sealed, or has another size.
        """
        try:
            path = PROCESSES / f"{pid:d}" / "fd" / f"{descriptor:d}"
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                # Check the name first: a stat of a file on another file system may block.
                is_memory = str(Path(f"/proc/self/fd/{place:d}").readlink()).startswith("/memfd:")
                if not is_memory or not stat.S_ISREG(os.fstat(place).st_mode):
                    raise WorkerUnavailable("the worker offered something other than memory")
                flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
                own = os.open(f"/proc/self/fd/{place:d}", flags)
            finally:
                os.close(place)
            try:
                return cls(size, _map_sealed(own, size))
            finally:
                os.close(own)
        except (OSError, AttributeError) as exc:  # only Linux has O_PATH
            why = exc.strerror if isinstance(exc, OSError) else "this system has none"
            raise WorkerUnavailable(
                f"the worker's sealed memory cannot be opened by this process ({why})"
            ) from exc

    @property
    def ref(self) -> SealedRef:
        """The reference by which a peer can open it while it is offered."""
        assert self._descriptor is not None
        return SealedRef(os.getpid(), self._descriptor, self.size)

    def withdraw(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class NamedSegment(Segment):
    """A file in a shared folder: for processes that do not see each other's /proc."""

    def __init__(self, size: int, mapping: mmap.mmap, path: Path) -> None:
        super().__init__(size, mapping)
        self.path = path

    @classmethod
    def create(cls, size: int, folder: Path = SHM_FOLDER) -> "NamedSegment":
        """Create and map a segment of `size` bytes, or fewer if the folder is small.

        Raises:
            WorkerUnavailable: there is no room, or no permission to make a file.
        """
        path = folder / f"tsqp-{secrets.token_hex(16)}"
        try:
            size = room_for(size, free_bytes(folder), f"no segment in {folder}")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
                return cls(size, mmap.mmap(descriptor, size), path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        except OSError as exc:
            raise WorkerUnavailable(f"no segment in {folder}: {exc.strerror}") from exc

    @classmethod
    def open(cls, name: str, size: int, folder: Path = SHM_FOLDER) -> "NamedSegment":
        """Map a segment that a worker made.

        Raises:
            WorkerUnavailable: it cannot be opened or is too short.
        """
        path = folder / name
        try:
            descriptor = open_file(path)
        except OSError as exc:
            raise WorkerUnavailable(
                f"the worker's segment is not in this side's {folder} ({exc.strerror})"
            ) from exc
        try:
            return cls(size, map_file(descriptor, size), path)
        finally:
            os.close(descriptor)

    @property
    def ref(self) -> SegmentRef:
        """The reference by which a peer can open it until it is withdrawn."""
        return SegmentRef(self.path.name, self.size)

    def withdraw(self) -> None:
        with suppress(OSError):  # already removed, or out of reach
            self.path.unlink()


def open_file(path: Path) -> int:
    """Open an existing file of shared memory; whatever has taken its place cannot block.

    Raises:
        OSError: it cannot be opened, or is a symbolic link.
    """
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def map_file(descriptor: int, size: int) -> mmap.mmap:
    """Map the first `size` bytes of a file or device.

    A device has no length, and in Gramine every file of shared memory is a device.

    Raises:
        WorkerUnavailable: it is too short, or cannot be mapped.
    """
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size < size:
            raise WorkerUnavailable(f"the worker's segment has {status.st_size} bytes, not {size}")
        return mmap.mmap(descriptor, size)
    except (OSError, ValueError) as exc:
        raise WorkerUnavailable(f"the worker's segment cannot be mapped: {exc}") from exc


def _seals() -> int:
    """The seals: nobody can resize the segment any more, but all can write."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def room_for(size: int, free: int, otherwise: str) -> int:
    """The size of a new segment: at most `size` bytes, in whole pages.

    Raises:
        WorkerUnavailable: that would be too small; `otherwise` begins the message.
    """
    # Use at most half of the free memory: other sessions and programs need some too.
    return whole_pages(min(size, free // 2), otherwise)


def whole_pages(size: int, otherwise: str) -> int:
    """`size` in whole pages.

    Raises:
        WorkerUnavailable: that would be too small; `otherwise` begins the message.
    """
    size = size // mmap.PAGESIZE * mmap.PAGESIZE
    if size < MIN_SEGMENT:
        raise WorkerUnavailable(
            f"{otherwise}: it would have {size} bytes, and {MIN_SEGMENT} are needed"
        )
    return size


def _map_sealed(descriptor: int, size: int) -> mmap.mmap:
    """Map a memfd whose memory cannot be taken away."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise WorkerUnavailable("the worker offers a file instead of sealed memory") from exc
    if seals & _seals() != _seals():
        raise WorkerUnavailable("the worker's memory is not sealed, so it could be taken away")
    if os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        # Seals do not prevent that huge pages are freed; the next access would cause SIGBUS.
        raise WorkerUnavailable("the worker's memory consists of huge pages")
    length = os.fstat(descriptor).st_size
    if length != size:
        raise WorkerUnavailable(f"the worker's sealed memory has {length} bytes, not {size}")
    return mmap.mmap(descriptor, size)


def free_bytes(folder: Path | None) -> int:
    """Free bytes for new segments: in memory, and in `folder` for segments with a name.

    Raises:
        WorkerUnavailable: there is no such folder.
    """
    if folder is None:
        return available_bytes()
    try:
        folder_size = os.statvfs(folder)
    except OSError as exc:
        raise WorkerUnavailable(f"no segment in {folder}: {exc.strerror}") from exc
    return min(folder_size.f_bavail * folder_size.f_frsize, available_bytes())


class Arena:
    """First-fit allocator of byte ranges in a segment.

    Only a few ranges are in use at a time, so a sorted list is enough. The lowest free place is
    used first, which keeps the same few pages in the cache.
    """

    def __init__(self, size: int, start: int = 0) -> None:
        """Manage the bytes [start, size)."""
        self.size = size - start
        self._start = -(-start // ALIGNMENT) * ALIGNMENT
        self._end = size
        self._used: list[tuple[int, int]] = []

    def take(self, length: int) -> int | None:
        """The offset of `length` free bytes, or None if there is no room."""
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
