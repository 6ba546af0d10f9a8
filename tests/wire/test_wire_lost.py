"""A worker that goes away: the client learns it in time, and keeps nothing."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from wire_helpers import (
    Echo,
    HelperProcess,
    WorkerThread,
    begin,
    echoes,
    eventually,
    finish,
    hello,
    mapped_segments,
    worker_process,
)

import tsqp.wire.client
import tsqp.wire.zmq
from tsqp.errors import WorkerLost
from tsqp.wire.client import RemoteChannel

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture(params=["tcp", "ipc"])
def mortal(
    request: pytest.FixtureRequest, tmp_path: Path, shm_folder: Path
) -> Iterator[HelperProcess]:
    """A worker process to be killed."""
    endpoint = "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://{tmp_path}/socket"
    with worker_process(tmp_path / "output", endpoint, shm_folder) as process:
        yield process


def test_a_killed_worker_is_noticed_while_a_call_is_out(
    mortal: HelperProcess, shm_folder: Path
) -> None:
    before = mapped_segments()
    channel = RemoteChannel(mortal.endpoint, hello(), shm_folder=shm_folder)
    assert echoes(channel)
    ticket = begin(channel, torch.ones(3), group="hang")
    mortal.send_signal(signal.SIGKILL)
    with pytest.raises(WorkerLost, match=r"is gone.*restart it"):
        finish(channel, ticket, 60)
    with pytest.raises(WorkerLost, match="has ended"):
        begin(channel, torch.ones(3))
    assert mapped_segments() <= before


def test_a_worker_killed_between_calls_is_noticed_at_the_next(
    tmp_path: Path, shm_folder: Path
) -> None:
    address = f"ipc://{tmp_path}/socket"
    with worker_process(tmp_path / "output", address, shm_folder) as first:
        channel = RemoteChannel(first.endpoint, hello(), shm_folder=shm_folder)
        assert echoes(channel)
        first.send_signal(signal.SIGKILL)
        assert eventually(lambda: not first.is_alive)
    with WorkerThread(address, shm_folder=shm_folder) as second:
        time.sleep(0.5)  # libzmq has connected to the new one by now
        with pytest.raises(WorkerLost, match="is gone"):
            echoes(channel)
        assert second.log == []


def test_a_stopped_worker_is_noticed(tmp_path: Path, shm_folder: Path) -> None:
    with worker_process(tmp_path / "output", "tcp://127.0.0.1:0", shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        ticket = begin(channel, torch.ones(3), group="hang")
        worker.send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerLost, match="is gone"):
            finish(channel, ticket, 60)
        worker.send_signal(signal.SIGKILL)


def test_a_worker_that_never_answers_is_given_up_at_the_deadline(
    tmp_path: Path, shm_folder: Path
) -> None:
    with worker_process(tmp_path / "output", f"ipc://{tmp_path}/socket", shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        ticket = begin(channel, torch.ones(3), group="hang")
        start = time.monotonic()
        with pytest.raises(WorkerLost, match=r"stopped answering.*--timeout"):
            finish(channel, ticket, 0.7)
        assert time.monotonic() - start >= 0.7
        assert worker.is_alive
        worker.send_signal(signal.SIGKILL)


def test_a_long_computation_is_not_taken_for_a_dead_worker(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds up the worker's only thread for longer than heartbeats may be missing."""
    monkeypatch.setattr(tsqp.wire.zmq, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(tsqp.wire.zmq, "SILENCE_MS", 500)
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        ticket = begin(channel, torch.ones(3), group="sleep", layer=1200)
        assert torch.equal(finish(channel, ticket)[0], torch.ones(3))
        channel.close()


def test_a_worker_that_stops_in_good_order_is_noticed(shm_folder: Path) -> None:
    with WorkerThread("tcp://127.0.0.1:0", Echo(), shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert echoes(channel)
    assert worker.log[-1] == "session ended (the worker stops), 0 left"
    with pytest.raises(WorkerLost, match="is gone"):
        echoes(channel)
    channel.close()


@pytest.mark.parametrize("is_posted", [True, False])
def test_an_interrupted_call_ends_the_session(
    worker: HelperProcess, shared_folder: Path, monkeypatch: pytest.MonkeyPatch, is_posted: bool
) -> None:
    """What was sent in part cannot be taken back, and must not run into the next message."""
    monkeypatch.setattr(tsqp.wire.client, "CAN_POLL", is_posted)
    channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shared_folder)
    assert echoes(channel)

    def interrupted(frames: object) -> None:
        raise KeyboardInterrupt

    if is_posted:
        monkeypatch.setattr(channel._mailbox, "post", interrupted)
    else:
        monkeypatch.setattr(channel._socket, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        begin(channel, torch.ones(3))
    with pytest.raises(WorkerLost, match="has ended"):
        begin(channel, torch.ones(3))
