"""Sealed shared memory: it cannot be taken away, and nothing else is taken for it."""

import errno
import fcntl
import mmap
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from wire_helpers import SEGMENT, HelperProcess, echoes, eventually, hello, welcome, worker_process
from wire_peers import LyingWorker, RawClient

from tsqp.errors import ProtocolError, WorkerUnavailable
from tsqp.wire import shm
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.messages import Attach, Failure, Offer, SealedRef, Welcome
from tsqp.wire.shm import MIN_SEGMENT, SealedSegment

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")

SIZE = 2**20
SHRINK, GROW = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW
ALL = SHRINK | GROW | fcntl.F_SEAL_SEAL


@pytest.fixture
def segment() -> Iterator[SealedSegment]:
    segment = SealedSegment.create(SIZE)
    yield segment
    segment.close()


@pytest.fixture
def descriptor(segment: SealedSegment) -> int:
    return segment.ref.descriptor


def open_ref(ref: SealedRef) -> SealedSegment:
    return SealedSegment.open(ref.pid, ref.descriptor, ref.size)


def test_both_sides_see_the_same_tensors(segment: SealedSegment) -> None:
    other = open_ref(segment.ref)
    mine, theirs = (s.tensor(128, (2, 3), torch.bfloat16) for s in (segment, other))
    mine.copy_(torch.arange(6).view(2, 3))
    assert torch.equal(theirs, mine)
    theirs[1, 2] = -1.0
    assert mine[1, 2] == -1.0
    assert mine.data_ptr() != theirs.data_ptr()
    other.close()


@pytest.mark.parametrize("size", [0, MIN_SEGMENT, SIZE - 1, SIZE + 1, 2**30])
def test_nobody_can_change_its_size(descriptor: int, size: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, size)
    assert os.fstat(descriptor).st_size == SIZE


def test_nobody_can_lift_its_seals(descriptor: int) -> None:
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & ALL == ALL
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_hole_that_a_peer_makes_reads_as_zeros(segment: SealedSegment) -> None:
    """The pages go, the size stays: the next access gets new pages and no signal."""
    other = open_ref(segment.ref)
    mine = other.tensor(0, (SIZE,), torch.uint8)
    mine.fill_(7)
    assert segment._mapping is not None
    segment._mapping.madvise(getattr(mmap, "MADV_REMOVE", 9))
    assert mine.sum() == 0
    mine.fill_(3)
    assert segment.read(4) == b"\3" * 4
    other.close()


def test_it_is_allocated_at_once(descriptor: int) -> None:
    assert os.fstat(descriptor).st_blocks * 512 >= SIZE


def test_a_segment_takes_half_of_what_is_free_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "available_bytes", lambda: 2 * SIZE + 5000)
    segment = SealedSegment.create(2**30)
    assert segment.size == SIZE
    segment.close()


@pytest.mark.parametrize("failing", ["memfd_create", "posix_fallocate"])
def test_a_system_that_refuses_is_named_and_nothing_stays_open(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(WorkerUnavailable, match="no sealed memory: No space left"):
        SealedSegment.create(SIZE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_nothing_outlives_it() -> None:
    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), maps.count("tsqp-segment")

    before = held()
    for _ in range(20):
        segment = SealedSegment.create(MIN_SEGMENT)
        other = open_ref(segment.ref)
        segment.close()
        segment.close()
        with pytest.raises(ProtocolError, match="closed"):
            segment.tensor(0, (1,), torch.float32)
        other.close()
    with pytest.raises(WorkerUnavailable):
        SealedSegment.create(MIN_SEGMENT - 1)
    assert held() == before


def memfd(seals: int, size: int = SIZE, flags: int = 0) -> int:
    number = os.memfd_create("tsqp-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(number, size)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(number)
        pytest.skip("this system has no such memory")
    return number


def huge_pages() -> int:
    return memfd(ALL, 2**21, os.MFD_HUGETLB)


def fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)


def regular(folder: Path) -> int:
    number = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(number, SIZE)
    return number


def tmpfs_file(folder: Path) -> int:
    number = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(number, SIZE)
    return number


def unix_socket(folder: Path) -> int:
    return socket.socket(socket.AF_UNIX).detach()


OTHER_THINGS: dict[str, tuple[Callable[[Path], int], int, str]] = {
    "can shrink": (lambda folder: memfd(GROW | fcntl.F_SEAL_SEAL), SIZE, "is not sealed"),
    "has no seals": (lambda folder: memfd(0), SIZE, "is not sealed"),
    "is read-only": (lambda folder: memfd(ALL | fcntl.F_SEAL_WRITE), SIZE, "cannot be opened"),
    "is short": (lambda folder: memfd(ALL, SIZE - mmap.PAGESIZE), SIZE, "bytes, not"),
    "is long": (lambda folder: memfd(ALL, SIZE + mmap.PAGESIZE), SIZE, "bytes, not"),
    "has huge pages": (lambda folder: huge_pages(), 2**21, "huge pages"),
    "is a pipe": (fifo, SIZE, "something other than memory"),
    "is a file": (regular, SIZE, "something other than memory"),
    "is a file in memory": (tmpfs_file, SIZE, "something other than memory"),
    "is a folder": (lambda folder: os.open(folder, os.O_RDONLY), SIZE, "something other"),
    "is a device": (lambda folder: os.open("/dev/zero", os.O_RDWR), SIZE, "something other"),
    "is a socket": (unix_socket, SIZE, "something other than memory"),
    "is an event": (lambda folder: os.eventfd(0), SIZE, "something other than memory"),
    "is a process": (lambda folder: os.pidfd_open(os.getpid()), SIZE, "other|cannot"),
}


@pytest.mark.parametrize(("make", "size", "words"), OTHER_THINGS.values(), ids=OTHER_THINGS)
def test_memory_is_not_used_that(
    make: Callable[[Path], int], size: int, words: str, tmp_path: Path
) -> None:
    """The worker of a test is its own process: what it names is opened all the same."""
    number = make(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        with pytest.raises(WorkerUnavailable, match=words):
            SealedSegment.open(os.getpid(), number, size)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        os.close(number)


def test_a_pipe_or_a_device_is_not_even_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = os.open

    def counted(path: object, flags: int, *rest: object) -> int:
        opened.append(flags)
        return real(path, flags, *rest)  # type: ignore[arg-type]

    with ExitStack() as stack:
        for number in (fifo(tmp_path), os.open("/dev/zero", os.O_RDWR)):
            stack.callback(os.close, number)
            monkeypatch.setattr(os, "open", counted)
            with pytest.raises(WorkerUnavailable):
                SealedSegment.open(os.getpid(), number, SIZE)
            monkeypatch.undo()
    assert len(opened) == 2
    assert all(flags & os.O_PATH for flags in opened)


OURSELVES = 0


@pytest.mark.parametrize(("pid", "number"), [(2**31 - 1, 3), (1, 2**31 - 1), (OURSELVES, 9999)])
def test_what_is_not_there_cannot_be_opened(pid: int, number: int) -> None:
    pid = pid or os.getpid()
    with pytest.raises(WorkerUnavailable, match="cannot be opened by this process"):
        SealedSegment.open(pid, number, SIZE)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("make", [fifo, regular, lambda folder: memfd(0, SEGMENT)])
def test_a_worker_that_offers_something_else_is_asked_for_a_name(
    make: Callable[[Path], int], tmp_path: Path
) -> None:
    number = make(tmp_path)
    ref = SealedRef(os.getpid(), number, SEGMENT)
    offers = [encode(Offer(None, "names are all used up"))]
    with LyingWorker(
        greeting=lambda nonce: [encode(welcome(nonce, segment=ref))], offer=offers
    ) as w:
        channel = RemoteChannel(w.endpoint, hello())
        assert channel.transport == "inline"
        assert channel.reason.startswith("names are all used up; the worker")
        channel.close()
    os.close(number)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_worker_that_answers_something_else_than_an_offer_is_refused(tmp_path: Path) -> None:
    ref = SealedRef(2**31 - 1, 0, SEGMENT)
    lies: list[Callable[[bytes], bytes]] = [
        lambda nonce: encode(welcome(nonce)),
        lambda nonce: encode(Failure("error", "no")),
        lambda nonce: encode(Offer(None))[:-1],
    ]
    for lie in lies:
        answer = [lie(bytes(32))]
        with (
            LyingWorker(
                greeting=lambda nonce: [encode(welcome(nonce, segment=ref))], offer=answer
            ) as worker,
            pytest.raises(ProtocolError),
        ):
            RemoteChannel(worker.endpoint, hello())


def test_a_client_may_ask_for_a_name_once(worker: HelperProcess) -> None:
    wants = encode(Attach(False, False, wants_name=True))
    with RawClient(worker.endpoint) as client:
        assert isinstance(client.shake_hands(), Welcome)
        client.send(wants)
        offer = client.receive()
        assert isinstance(offer, Offer) and offer.segment is not None
        client.send(wants)
        refusal = client.receive()
        assert isinstance(refusal, Failure)
        assert "asked for another segment" in refusal.message


def test_a_client_that_polls_may_not_ask_for_a_name(worker: HelperProcess) -> None:
    with RawClient(worker.endpoint) as client:
        assert isinstance(client.shake_hands(), Welcome)
        client.send(encode(Attach(True, True)))
        client.send(encode(Attach(False, False, wants_name=True)))
        assert isinstance(client.receive(), Failure)


def test_the_memory_outlives_its_worker(tmp_path: Path, shm_folder: Path) -> None:
    with worker_process(tmp_path / "output", f"ipc://{tmp_path}/socket", shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert "sealed" in channel.reason
        assert echoes(channel)
        assert channel._segment is not None
        tensor = channel._segment.tensor(SEGMENT // 2, (4,), torch.float32)
        worker.send_signal(signal.SIGKILL)
        assert eventually(lambda: not worker.is_alive)
        tensor.fill_(3.0)
        assert tensor.sum() == 12.0
        channel.close()


def test_a_client_cannot_take_memory_from_a_worker(worker: HelperProcess) -> None:
    with RawClient(worker.endpoint) as client:
        greeting = client.shake_hands()
        assert isinstance(greeting, Welcome) and isinstance(greeting.segment, SealedRef)
        ref = greeting.segment
        own = os.open(f"/proc/{ref.pid}/fd/{ref.descriptor}", os.O_RDWR)
        assert stat.S_ISREG(os.fstat(own).st_mode)
        with pytest.raises(PermissionError):
            os.ftruncate(own, 0)
        os.close(own)
    assert worker.is_alive
