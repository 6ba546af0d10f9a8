"""Shared memory at a fixed place: the TEE opens that path, and nothing that a worker names."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from wire_helpers import SEGMENT, SHARED, WorkerThread, echoes, eventually, hello, welcome
from wire_peers import LyingWorker

from tsqp.errors import UsageError, WorkerUnavailable
from tsqp.wire import fixed_segment
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.fixed_segment import FixedPlace, FixedSegment, parse_place
from tsqp.wire.messages import FixedRef, SealedRef, SegmentRef
from tsqp.wire.shm import MIN_SEGMENT, NamedSegment, SealedSegment

Ref = SealedRef | SegmentRef | FixedRef
SIZE = 2**20


@pytest.fixture
def name(shm_folder: Path) -> FixedPlace:
    return parse_place("tsqp", shm_folder)


@pytest.fixture
def device(shm_folder: Path) -> Iterator[FixedPlace]:
    """A file of fixed length that exists already, as for an ivshmem device."""
    path = shm_folder / "ivshmem"
    path.write_bytes(b"\x07" * SEGMENT)
    yield parse_place(str(path))
    path.unlink()


def connect(endpoint: Endpoint, place: FixedPlace) -> RemoteChannel:
    return RemoteChannel(endpoint, hello(fixed_shm=True), shm_path=place.path)


@pytest.mark.parametrize("text", ["tsqp", "tsqp-a.b_C9", "/dev/shm/x", "/sys/bus/pci/resource2"])
def test_a_name_or_a_path_is_a_place(text: str) -> None:
    assert str(parse_place(text)) == text


@pytest.mark.parametrize(
    "text", ["", "other", "tsqp/x", "tsqp x", "../tsqp", "a/b", "/dev/shm/../x", "/a\n", "tsqp\n"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shm-name takes a name"):
        parse_place(text)


def test_a_session_shares_memory_by_name(name: FixedPlace, nothing_is_left: None) -> None:
    with (
        WorkerThread("tcp://127.0.0.1:0", shm_place=name) as worker,
        closing(connect(worker.endpoint, name)) as channel,
    ):
        assert (channel.transport, echoes(channel)) == (SHARED, True)
        assert channel.reason == f"{SEGMENT} bytes at {name.path}"
        assert eventually(lambda: not name.path.exists())  # nobody else can open it


def test_sessions_by_one_name_have_memory_of_their_own(
    name: FixedPlace, nothing_is_left: None
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_place=name) as worker:
        first = connect(worker.endpoint, name)
        assert eventually(lambda: not name.path.exists())
        second = connect(worker.endpoint, name)
        assert first.transport == second.transport == SHARED
        for _ in range(3):
            assert echoes(first, 1.0) and echoes(second, 2.0)
        first.close()
        second.close()


def test_a_session_shares_memory_that_exists(device: FixedPlace, nothing_is_left: None) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_place=device) as worker:
        for _ in range(2):  # what the first session left there does not disturb the second
            with closing(connect(worker.endpoint, device)) as channel:
                assert (channel.transport, echoes(channel)) == (SHARED, True)
            assert eventually(lambda: not worker.server.sessions)
    assert device.path.stat().st_size == SEGMENT


def test_memory_that_exists_serves_one_session_at_a_time(
    device: FixedPlace, nothing_is_left: None
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_place=device) as worker:
        first = connect(worker.endpoint, device)
        second = connect(worker.endpoint, device)
        assert (first.transport, second.transport) == (SHARED, "inline")
        assert (
            second.reason == f"the worker has no segment at {device.path}: another session uses it"
        )
        assert echoes(first) and echoes(second)
        first.close()
        second.close()


def test_the_locks_of_two_workers_exclude_each_other(device: FixedPlace) -> None:
    with device.path.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(WorkerUnavailable, match="another session uses it"):
            FixedSegment.make(device, SIZE)
    FixedSegment.make(device, SIZE).close()


def test_a_session_finds_nothing_of_an_earlier_one(device: FixedPlace) -> None:
    segment = FixedSegment.make(device, SIZE)
    assert not segment.tensor(0, (segment.size,), torch.uint8).any()
    segment.close()


def test_a_lock_ends_with_its_session_though_a_tensor_lives_on(device: FixedPlace) -> None:
    segment = FixedSegment.make(device, SIZE)
    tensor = segment.tensor(0, (4,), torch.uint8)
    segment.close()
    FixedSegment.make(device, SIZE).close()
    assert tensor.sum() == 0


def test_a_named_file_is_for_this_user_and_has_all_its_memory(name: FixedPlace) -> None:
    segment = FixedSegment.make(name, SIZE)
    status = name.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == segment.size == SIZE
    assert status.st_blocks * 512 >= SIZE
    segment.close()
    assert not name.path.exists()


def test_a_file_that_a_killed_worker_left_is_replaced(name: FixedPlace) -> None:
    name.path.write_bytes(b"old")
    old = name.path.stat().st_ino
    segment = FixedSegment.make(name, SIZE)
    assert name.path.stat().st_ino != old
    segment.close()


def test_a_name_that_is_offered_to_another_session_is_left_alone(name: FixedPlace) -> None:
    first = FixedSegment.make(name, SIZE)
    before = name.path.stat()
    with pytest.raises(WorkerUnavailable, match="another session uses it"):
        FixedSegment.make(name, SIZE)
    assert os.path.samestat(name.path.stat(), before)
    first.close()


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [_folder, _pipe, _link])
def test_something_else_in_the_place_is_left_alone(
    make: Callable[[Path], None], name: FixedPlace
) -> None:
    make(name.path)
    before = name.path.lstat()
    for place in (name, FixedPlace(name.path, is_name=False)):
        with pytest.raises(WorkerUnavailable, match="no segment at"):
            FixedSegment.make(place, SIZE)
        with pytest.raises(WorkerUnavailable):
            FixedSegment.open(place.path, SIZE)
    assert os.path.samestat(name.path.lstat(), before)
    name.path.rmdir() if make is _folder else name.path.unlink()


def test_a_file_of_another_user_is_left_alone(
    name: FixedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    name.path.write_bytes(b"theirs")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(WorkerUnavailable, match="something else has this name"):
        FixedSegment.make(name, SIZE)
    assert name.path.read_bytes() == b"theirs"
    name.path.unlink()


def test_memory_that_is_too_small_is_refused(device: FixedPlace) -> None:
    os.truncate(device.path, MIN_SEGMENT - 1)
    with pytest.raises(WorkerUnavailable, match=f"and {MIN_SEGMENT} are needed"):
        FixedSegment.make(device, SIZE)


def test_the_trusted_side_refuses_a_file_that_is_too_short(device: FixedPlace) -> None:
    """Reading behind its end would be SIGBUS."""
    with pytest.raises(WorkerUnavailable, match=f"{SEGMENT} bytes, not {SEGMENT + 4096}"):
        FixedSegment.open(device.path, SEGMENT + 4096)


def test_a_device_has_no_length_to_rely_on(
    device: FixedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Gramine `stat` shows a device of length 0."""
    fstat = os.fstat

    def like_gramine(descriptor: int) -> os.stat_result:
        fields = list(fstat(descriptor))
        fields[stat.ST_MODE], fields[stat.ST_SIZE] = stat.S_IFCHR | 0o600, 0
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", like_gramine)
    segment = FixedSegment.open(device.path, SEGMENT)
    assert segment.read(1) == b"\x07"
    segment.close()


def test_no_descriptor_and_no_file_outlives_a_failure(
    name: FixedPlace, device: FixedPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(list(Path("/proc/self/fd").iterdir()))
    for module, failing in ((os, "posix_fallocate"), (os, "link"), (fixed_segment, "map_file")):
        with monkeypatch.context() as patch:
            patch.setattr(module, failing, fail)
            with pytest.raises(WorkerUnavailable, match="No space left"):
                FixedSegment.make(name, SIZE)
    for place in (name, device):
        for _ in range(5):
            FixedSegment.make(place, SIZE).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not name.path.exists()


@pytest.mark.parametrize("is_fixed_here", [True, False])
def test_each_side_says_when_the_other_has_no_fixed_place(
    is_fixed_here: bool, name: FixedPlace, nothing_is_left: None
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_place=None if is_fixed_here else name) as worker:
        if is_fixed_here:
            channel = connect(worker.endpoint, name)
            assert (channel.transport, channel.reason) == (
                "inline",
                "the worker was started without --shm-name",
            )
        else:  # other clients have memory as they always do
            channel = RemoteChannel(worker.endpoint, hello())
            assert channel.transport == SHARED
            assert "sealed" in channel.reason
        assert echoes(channel)
        channel.close()


def _offering(ref: Ref, nonces: list[bytes]) -> LyingWorker:
    def greet(nonce: bytes) -> list[bytes]:
        nonces.append(nonce)
        return [encode(welcome(nonce, segment=ref))]

    return LyingWorker(greeting=greet)


@pytest.mark.parametrize("kind", ["sealed", "named"])
def test_what_a_worker_names_is_not_opened_when_the_place_is_fixed(
    kind: str, name: FixedPlace, shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: SealedSegment | NamedSegment = (
        SealedSegment.create(SEGMENT)
        if kind == "sealed"
        else NamedSegment.create(SEGMENT, shm_folder)
    )
    opened: list[object] = []
    real = os.open

    def noting(path: object, *arguments: int, **more: int) -> int:
        opened.append(path)
        return real(path, *arguments, **more)  # type: ignore[arg-type]

    with _offering(offered.ref, []) as worker:
        monkeypatch.setattr(os, "open", noting)
        channel = RemoteChannel(
            worker.endpoint, hello(fixed_shm=True), shm_folder=shm_folder, shm_path=name.path
        )
        assert channel.transport == "inline"
        assert channel.reason == "the worker offers a segment at another place than asked"
        assert opened == []
        channel.close()
    offered.close()


def test_a_fixed_place_is_not_opened_unless_this_side_was_told_one(name: FixedPlace) -> None:
    with _offering(FixedRef(SEGMENT), []) as worker:
        channel = RemoteChannel(worker.endpoint, hello())
        assert channel.reason == "the worker offers a segment at another place than asked"
        channel.close()


@pytest.mark.parametrize("size", [1, MIN_SEGMENT - 1, SEGMENT + 1, 2**40])
def test_memory_of_another_size_than_asked_is_not_used(size: int, device: FixedPlace) -> None:
    with _offering(FixedRef(size), []) as worker:
        channel = connect(worker.endpoint, device)
        assert "of another size than asked" in channel.reason
        channel.close()


def test_memory_of_somebody_else_is_not_used(device: FixedPlace) -> None:
    with _offering(FixedRef(SEGMENT), []) as worker:
        channel = connect(worker.endpoint, device)
        assert channel.reason == "the worker offers a segment that belongs to somebody else"
        channel.close()
