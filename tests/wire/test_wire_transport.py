"""How tensors travel, why so, and how many bytes the socket carries."""

import os
import secrets
from pathlib import Path

import pytest
import torch
from wire_helpers import (
    SEGMENT,
    SHARED,
    HelperProcess,
    WorkerThread,
    begin,
    echoes,
    eventually,
    finish,
    hello,
    welcome,
)
from wire_mounts import run_in_a_mount
from wire_peers import CountingProxy, LyingWorker

import tsqp.wire.client
import tsqp.wire.shm
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.mailbox import CAN_POLL
from tsqp.wire.messages import Probe, SegmentRef
from tsqp.wire.quotas import Quotas
from tsqp.wire.shm import MIN_SEGMENT, NamedSegment

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def socket_bytes_of_calls(proxy: CountingProxy, channel: RemoteChannel, floats: int) -> int:
    """What ten calls add to the connection, heartbeats left out as far as they can be."""
    before = proxy.total
    for _ in range(10):
        finish(channel, begin(channel, torch.ones(floats)))
    return proxy.total - before


def test_over_shared_memory_a_call_costs_few_bytes_whatever_its_size(
    worker: HelperProcess, shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsqp.wire.client, "CAN_POLL", False)
    with CountingProxy(worker.endpoint) as proxy:
        channel = RemoteChannel(proxy.endpoint, hello(), shm_folder=shared_folder)
        assert channel.transport == "shm"
        small = socket_bytes_of_calls(proxy, channel, 1)
        large = socket_bytes_of_calls(proxy, channel, channel.max_call_bytes // 8)
        counted = channel.counters.socket_bytes
        channel.close()
        assert 0 < small < 10 * 300
        assert abs(large - small) < 10 * 20
        # What ZeroMQ adds: its greeting, a few bytes a frame, a heartbeat a second.
        assert counted < proxy.total < counted + 1000


@pytest.mark.skipif(not CAN_POLL, reason="this processor reorders stores")
def test_a_posted_call_puts_nothing_but_wake_up_calls_on_the_socket(
    worker: HelperProcess, shared_folder: Path
) -> None:
    with CountingProxy(worker.endpoint) as proxy:
        channel = RemoteChannel(proxy.endpoint, hello(), shm_folder=shared_folder)
        assert channel.transport == "poll"
        probe = len(encode(Probe()))
        for floats in (1, channel.max_call_bytes // 8):
            before = channel.counters.socket_bytes
            assert socket_bytes_of_calls(proxy, channel, floats) < 10 * 300
            assert (channel.counters.socket_bytes - before) % probe == 0
            assert channel.counters.socket_bytes - before <= 10 * 2 * probe
        counted = channel.counters.socket_bytes
        channel.close()
        # The proxy also sees probes that nobody had to take, one a call at most.
        assert proxy.total < counted + 20 * (probe + 2) + 1000


def test_inline_calls_carry_their_tensors_on_the_socket(
    worker: HelperProcess, shared_folder: Path
) -> None:
    with CountingProxy(worker.endpoint) as proxy:
        channel = RemoteChannel(proxy.endpoint, hello(shm_bytes=0), shm_folder=shared_folder)
        floats = 2**15
        on_the_wire = socket_bytes_of_calls(proxy, channel, floats)
        counted = channel.counters.socket_bytes
        channel.close()
        assert 20 * 4 * floats < on_the_wire < 20 * 4 * floats + 5000
        assert counted < proxy.total < counted + 2000


def test_without_shared_memory_the_reason_is_the_callers(worker: HelperProcess) -> None:
    channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0), no_shm_reason="no, thanks")
    assert (channel.transport, channel.reason) == ("inline", "no, thanks")
    channel.close()


def test_shared_memory_is_sealed_and_reported_with_its_size(
    worker: HelperProcess, shared_folder: Path
) -> None:
    channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shared_folder)
    assert (channel.transport, channel.reason) == (SHARED, f"{SEGMENT} bytes of sealed memory")
    channel.close()


UNSEEN = "the worker's sealed memory cannot be opened by this process (No such file or directory)"


@pytest.fixture
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This side does not see other processes, as in another PID namespace."""
    monkeypatch.setattr(tsqp.wire.shm, "PROCESSES", tmp_path / "nobody")


@pytest.mark.usefixtures("unseen")
def test_where_sealed_memory_is_out_of_reach_a_segment_has_a_name(
    worker: HelperProcess, shared_folder: Path
) -> None:
    channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shared_folder)
    assert channel.transport == SHARED
    assert channel.reason == f"{SEGMENT} bytes in {shared_folder}; {UNSEEN}"
    assert echoes(channel)
    assert eventually(lambda: not list(shared_folder.iterdir()))
    channel.close()


def test_a_worker_that_cannot_seal_memory_offers_a_segment_with_a_name(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert channel.transport == SHARED
        assert channel.reason == (
            f"{SEGMENT} bytes in {shm_folder}; "
            "the worker has no sealed memory: this system has none"
        )
        assert echoes(channel)
        channel.close()


def test_a_worker_without_shared_memory_says_so(shm_folder: Path) -> None:
    with WorkerThread("tcp://127.0.0.1:0", quotas=Quotas(max_shm_bytes=0)) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert channel.transport == "inline"
        assert channel.reason == "the worker was started with --no-shm"
        assert echoes(channel)
        channel.close()


@pytest.mark.usefixtures("unseen")
def test_a_worker_whose_folder_is_missing_says_so(tmp_path: Path) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=tmp_path / "absent") as worker:
        channel = RemoteChannel(worker.endpoint, hello())
        assert channel.reason == (
            f"the worker has no segment in {tmp_path}/absent: No such file or directory; {UNSEEN}"
        )
        assert echoes(channel)
        channel.close()


def test_a_segment_that_would_be_too_small_is_not_made(shm_folder: Path) -> None:
    with WorkerThread(
        "tcp://127.0.0.1:0", quotas=Quotas(max_shm_bytes=8192), shm_folder=shm_folder
    ) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert channel.reason == (
            f"the worker has no segment in {shm_folder}: it would have 8192 bytes, and "
            f"{MIN_SEGMENT} are needed; the worker has no sealed memory: it would have 8192 bytes, "
            f"and {MIN_SEGMENT} are needed"
        )
        assert echoes(channel)
        channel.close()


@pytest.mark.usefixtures("unseen")
def test_a_client_that_sees_neither_processes_nor_the_folder_goes_on_inline(
    tmp_path: Path, shm_folder: Path
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=tmp_path)
        assert channel.transport == "inline"
        assert channel.reason == (
            f"the worker's segment is not in this side's {tmp_path} (No such file or directory); "
            f"{UNSEEN}"
        )
        assert echoes(channel)
        assert list(shm_folder.iterdir()) == []
        assert [session.segment for session in worker.server.sessions.values()] == [None]
        channel.close()


def _offer(name: str, size: int) -> LyingWorker:
    segment = SegmentRef(name, size)
    return LyingWorker(greeting=lambda nonce: [encode(welcome(nonce, segment=segment))])


@pytest.mark.parametrize("size", [1, MIN_SEGMENT - 1, SEGMENT + 1, 2**40])
def test_a_segment_of_another_size_than_asked_is_not_used(shm_folder: Path, size: int) -> None:
    with _offer("tsqp-" + "0" * 32, size) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert "of another size than asked" in channel.reason
        channel.close()


def test_a_segment_of_somebody_else_is_not_used(shm_folder: Path) -> None:
    foreign = NamedSegment.create(SEGMENT, shm_folder)
    foreign.write(secrets.token_bytes(32))
    with _offer(foreign.path.name, SEGMENT) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert channel.transport == "inline"
        assert channel.reason == "the worker offers a segment that belongs to somebody else"
        channel.close()
    foreign.close()


def _in_a_mount(folder: Path, options: str) -> list[str]:
    """The transport and the reason in a tmpfs of these options, once a call of 1 MB was echoed."""
    program = f"""
        import torch
        import tsqp.wire.shm
        from pathlib import Path
        from wire_helpers import WorkerThread, begin, echoes, finish, hello
        from tsqp.wire.client import RemoteChannel
        folder = Path({str(folder)!r})
        tsqp.wire.shm.PROCESSES = Path("/nowhere")
        large = torch.arange(2**18)
        with WorkerThread("tcp://127.0.0.1:0", shm_folder=folder) as worker:
            channel = RemoteChannel(worker.endpoint, hello(), shm_folder=folder)
            assert echoes(channel)
            before = channel.counters.socket_bytes
            assert torch.equal(finish(channel, begin(channel, large))[0], large)
            assert channel.counters.socket_bytes - before > 2 * large.nbytes
            assert echoes(channel)
            print(channel.transport)
            print(channel.reason)
            channel.close()
        assert not list(folder.iterdir())
    """
    return run_in_a_mount(folder, options, program).splitlines()


@pytest.mark.slow
def test_in_a_full_folder_tensors_go_inline(tmp_path: Path) -> None:
    assert _in_a_mount(tmp_path, "size=64k") == [
        "inline",
        f"the worker has no segment in {tmp_path}: it would have 32768 bytes, "
        f"and {MIN_SEGMENT} are needed; {UNSEEN}",
    ]


@pytest.mark.slow
def test_in_a_folder_that_may_not_be_written_tensors_go_inline(tmp_path: Path) -> None:
    assert _in_a_mount(tmp_path, "size=4m,ro") == [
        "inline",
        f"the worker has no segment in {tmp_path}: Read-only file system; {UNSEEN}",
    ]


def test_in_a_folder_smaller_than_a_call_only_that_call_goes_inline(tmp_path: Path) -> None:
    assert _in_a_mount(tmp_path, "size=1m") == [SHARED, f"{2**19} bytes in {tmp_path}; {UNSEEN}"]
