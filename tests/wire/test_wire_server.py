"""Several clients of one worker, that come and go."""

import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wire_helpers import (
    SEGMENT,
    SHARED,
    Echo,
    HelperProcess,
    WorkerThread,
    begin,
    client_process,
    echoes,
    eventually,
    finish,
    hello,
    worker_process,
)
from wire_peers import RawClient

import tsqp.wire.server
import tsqp.wire.shm
import tsqp.wire.zmq
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Attach, Failure, Hello, Offer, Operation, Welcome
from tsqp.wire.peers import Peers
from tsqp.wire.server import Server
from tsqp.wire.server_socket import ServerSocket

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_clients_at_once_get_their_own_answers(worker: HelperProcess, shared_folder: Path) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        shm_bytes = SEGMENT if number % 2 else 0
        channel = RemoteChannel(
            worker.endpoint, hello(shm_bytes=shm_bytes), shm_folder=shared_folder
        )
        for i in range(100):
            value = number * 1000.0 + i
            tickets = [begin(channel, torch.full((number + 1,), value + 0.25 * j)) for j in (0, 1)]
            for j in (1, 0):
                if not bool((finish(channel, tickets[j])[0] == value + 0.25 * j).all()):
                    wrong.append(f"client {number}, call {i}")
        channel.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_killed_client_is_freed(tmp_path: Path, shm_folder: Path) -> None:
    with worker_process(tmp_path / "worker", f"ipc://{tmp_path}/socket", shm_folder) as worker:
        survivor = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        with client_process(tmp_path / "client", worker.endpoint, shm_folder) as client:
            assert client.says(f"connected over {SHARED}"), client.words
            assert len(worker.segments) == 2
            client.send_signal(signal.SIGKILL)
            assert worker.says("session ended (the client left), 1 left", 10)
            assert eventually(lambda: len(worker.segments) == 1)
        assert echoes(survivor)
        survivor.close()
        assert worker.says("0 left")
        assert eventually(lambda: worker.segments == [])


class Books:
    """A service that notes when what it opened for a client is closed."""

    def __init__(self) -> None:
        self.open_now: list[int] = []
        self.opened = 0

    def welcome(self, hello: Hello) -> Welcome:
        return Echo().welcome(hello)

    def open(self) -> "Page":
        self.opened += 1
        self.open_now.append(self.opened)
        return Page(self, self.opened)


class Page(Echo):
    """Answers every call with the number of the client."""

    def __init__(self, books: Books, number: int) -> None:
        super().__init__()
        self._books, self._number = books, number

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        outputs[0].fill_(self._number)

    def close(self) -> None:
        self._books.open_now.remove(self._number)  # raises when it is closed twice


def test_each_client_has_a_session_of_its_own_until_it_leaves(
    tmp_path: Path, shm_folder: Path
) -> None:
    books = Books()
    with WorkerThread(f"ipc://{tmp_path}/socket", books, shm_folder=shm_folder) as worker:
        one, two = (
            RemoteChannel(worker.endpoint, hello(shm_bytes=size), shm_folder=shm_folder)
            for size in (SEGMENT, 0)
        )
        for _ in range(2):
            for number, channel in enumerate((one, two), 1):
                assert finish(channel, begin(channel, torch.zeros(2)))[0].tolist() == [number] * 2
        assert books.open_now == [1, 2]
        one.close()
        assert eventually(lambda: books.open_now == [2])
        with client_process(tmp_path / "client", worker.endpoint, shm_folder) as client:
            assert eventually(lambda: books.open_now == [2, 3])
            client.send_signal(signal.SIGKILL)
            assert eventually(lambda: books.open_now == [2])
        with RawClient(worker.endpoint) as rude:
            assert isinstance(rude.shake_hands(shm_bytes=0), Welcome)
            assert books.open_now == [2, 4]
            rude.send(b"\xff" * 100)
            assert isinstance(rude.receive(), Failure)
            assert eventually(lambda: books.open_now == [2])
        three = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
    assert books.open_now == []  # the worker stopped
    two.close()
    three.close()


def test_a_client_that_cannot_map_the_segment_keeps_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = Books()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="wire-test-") as folder,
        WorkerThread(f"ipc://{tmp_path}/socket", books, shm_folder=Path(folder)) as worker,
    ):
        monkeypatch.setattr(tsqp.wire.shm, "PROCESSES", tmp_path)
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=tmp_path)
        assert channel.transport == "inline"
        assert finish(channel, begin(channel, torch.zeros(2)))[0].tolist() == [1, 1]
        assert books.open_now == [1]
        channel.close()
        assert eventually(lambda: books.open_now == [])


def test_a_stopped_client_is_freed(
    tmp_path: Path, shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsqp.wire.zmq, "HEARTBEAT_MS", 200)
    monkeypatch.setattr(tsqp.wire.zmq, "SILENCE_MS", 1500)
    with (
        WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as own,
        client_process(tmp_path / "client", own.endpoint, shm_folder) as client,
    ):
        assert client.says(f"connected over {SHARED}"), client.words
        client.send_signal(signal.SIGSTOP)
        assert eventually(lambda: not own.server.sessions, 9)


def test_a_closed_channel_is_freed_at_once(busy: WorkerThread, shm_folder: Path) -> None:
    channel = RemoteChannel(busy.endpoint, hello(), shm_folder=shm_folder)
    assert len(busy.server.sessions) == 2
    channel.close()
    assert eventually(lambda: len(busy.server.sessions) == 1)


def test_clients_that_come_and_go_while_the_worker_is_away_are_freed(shm_folder: Path) -> None:
    worker = WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder)
    for _ in range(5):
        with RawClient(worker.endpoint) as client:
            client.send(encode(hello()))
    with worker:
        assert eventually(lambda: "session opened, 1 now" in worker.log)
        assert eventually(lambda: not worker.server.sessions and not list(shm_folder.iterdir()))
        channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
        assert echoes(channel)
        channel.close()


def test_a_client_that_never_attaches_leaves_no_file(busy: WorkerThread, shm_folder: Path) -> None:
    with RawClient(busy.endpoint) as client:
        assert isinstance(client.shake_hands(), Welcome)
        client.send(encode(Attach(False, False, wants_name=True)))
        assert isinstance(client.receive(), Offer)
        assert len(list(shm_folder.iterdir())) == 1
    assert eventually(lambda: list(shm_folder.iterdir()) == [])


def test_an_idle_client_may_leave_thousands_of_probes_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = 0
    probe_all = Server._free_lost_sessions

    def probe_often(server: Server) -> None:
        nonlocal probed
        for _ in range(50):
            probe_all(server)
        probed += 50

    monkeypatch.setattr(tsqp.wire.zmq, "TICK_MS", 1)
    monkeypatch.setattr(tsqp.wire.server, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(ServerSocket, "a_peer_left", lambda socket: True)
    monkeypatch.setattr(Server, "_free_lost_sessions", probe_often)
    with WorkerThread(f"ipc://{tmp_path}/socket") as worker:
        idle = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        assert eventually(lambda: probed > 5000)  # more than both sockets hold
        assert echoes(idle)
        idle.close()


def test_a_worker_that_cannot_watch_its_peers_serves_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Peers, "look", failing)
    server = Server(parse_endpoint("tcp://127.0.0.1:0"), log=lambda _: None)
    try:
        endpoint = parse_endpoint(server.address)
        with (
            socket.create_connection((endpoint.host, endpoint.port)),
            pytest.raises(RuntimeError, match="not watched any more"),
        ):
            server.serve(Echo(), lambda: False)
    finally:
        server.close()
