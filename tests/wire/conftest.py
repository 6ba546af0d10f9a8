"""What every test of the wire leaves as it found it."""

import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from wire_helpers import (
    SHARED,
    HelperProcess,
    WorkerThread,
    begin,
    echoes,
    eventually,
    finish,
    hello,
    worker_process,
)

import tsqp.wire.inflow
import tsqp.wire.peers
from tsqp.wire.client import RemoteChannel

SHM = Path("/dev/shm")


@pytest.fixture(scope="session")
def shared_folder() -> Iterator[Path]:
    """A folder in shared memory for the worker that all tests share."""
    with tempfile.TemporaryDirectory(dir=SHM, prefix="wire-tests-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def worker(
    shared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HelperProcess]:
    """An honest worker process, on tcp."""
    output = tmp_path_factory.mktemp("worker") / "output"
    with worker_process(output, "tcp://127.0.0.1:0", shared_folder) as process:
        # pyzmq starts its collector of buffers, once for all, at the first inline tensor.
        channel = RemoteChannel(process.endpoint, hello(shm_bytes=0))
        finish(channel, begin(channel, torch.ones(2**16)))
        channel.close()
        gc.collect()
        gc.freeze()  # what torch made at its import need not be looked at after each test
        yield process
        assert process.is_alive, process.words


@pytest.fixture(scope="session")
def ipc_worker(
    shared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HelperProcess]:
    """An honest worker process, on a Unix socket."""
    folder = tmp_path_factory.mktemp("ipc")
    with worker_process(folder / "output", f"ipc://{folder}/socket", shared_folder) as process:
        yield process
        assert process.is_alive, process.words


@pytest.fixture
def shm_folder() -> Iterator[Path]:
    """A folder in shared memory, which must be empty again at the end."""
    with tempfile.TemporaryDirectory(dir=SHM, prefix="wire-test-") as folder:
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


@pytest.fixture
def nothing_is_left(
    worker: HelperProcess, ipc_worker: HelperProcess, shared_folder: Path
) -> Iterator[None]:
    """No thread, no open file, and no segment that a test does not clean up."""
    gc.collect()
    before = _resources()
    yield
    gc.collect()
    assert eventually(lambda: _resources() == before), (before, _resources())
    assert eventually(lambda: list(shared_folder.iterdir()) == [])


@pytest.fixture
def busy(nothing_is_left: None, shm_folder: Path) -> Iterator[WorkerThread]:
    """A worker with an honest client, which must be served before and after a test."""
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert echoes(channel)
        yield worker
        assert channel.transport == SHARED
        assert echoes(channel)
        assert eventually(lambda: len(worker.server.sessions) == 1)
        channel.close()
        assert eventually(lambda: not worker.server.sessions)


@pytest.fixture
def exact_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more for heartbeats, which would depend on how fast this machine is."""
    monkeypatch.setattr(tsqp.wire.inflow, "IDLE_BYTES_S", 0)


@pytest.fixture
def rare_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard does not look while a connection lasts, as on a machine that is busy enough."""
    monkeypatch.setattr(tsqp.wire.inflow, "LOOK_MS", 10**6)


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker bears a MiB of each client that it has not received as messages."""
    monkeypatch.setattr(tsqp.wire.peers, "MAX_INFLOW", 2**20)


def _resources() -> tuple[int, int, int, int]:
    """Python's threads, libzmq's threads, open files, and mapped segments."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            names.append((task / "comm").read_text())
    maps = Path("/proc/self/maps").read_text()
    return (
        threading.active_count(),
        sum(name.startswith("ZMQ") for name in names),
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        maps.count("/tsqp-") + maps.count("/memfd:tsqp-"),
    )
