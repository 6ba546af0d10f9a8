"""A peer whose message never ends is hung up on, before it fills the memory."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from wire_floods import EMPTY, FloodingWorker, flood_worker, memory_stays_below
from wire_helpers import TIMEOUT, Echo, WorkerThread, begin, echoes, eventually, finish, hello
from wire_peers import CountingProxy, LyingWorker, RawClient

import tsqp.wire.inflow
import tsqp.wire.peers
import tsqp.wire.zmq
from tsqp.errors import ProtocolError
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.inflow import SLACK, Guard, Inflow
from tsqp.wire.messages import Result, Welcome
from tsqp.wire.relay import Relay
from tsqp.wire.zmq import new_key_pair

pytestmark = pytest.mark.usefixtures("nothing_is_left", "exact_counts")

MIB = 2**20
BOUND = 300 * MIB  # a flood that nobody stops passes it in two seconds
PUBLIC, SECRET = new_key_pair()


@pytest.fixture(params=["tcp", "ipc"])
def socket_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "tcp" else tmp_path / "socket"


def test_a_worker_that_floods_instead_of_a_welcome_is_refused(socket_path: Path | None) -> None:
    with (
        FloodingWorker(welcomes=False, path=socket_path) as worker,
        memory_stays_below(BOUND),
        pytest.raises(ProtocolError, match="sent more than it was asked for, in a message without"),
    ):
        RemoteChannel(worker.endpoint, hello(), connect_timeout=TIMEOUT)


def test_a_worker_that_floods_while_nobody_listens_is_refused(socket_path: Path | None) -> None:
    with (
        FloodingWorker(welcomes=True, path=socket_path) as worker,
        memory_stays_below(BOUND),
    ):
        channel = RemoteChannel(worker.endpoint, hello(), connect_timeout=TIMEOUT)
        assert eventually(lambda: channel._socket.inflow.is_over)  # as this thread computes
        with pytest.raises(ProtocolError, match="do not trust it"):
            begin(channel, torch.ones(3))
        channel.close()


def test_a_flood_that_ends_before_the_guard_looks_is_named(
    socket_path: Path | None, rare_looks: None
) -> None:
    with (
        FloodingWorker(welcomes=False, path=socket_path, most=2 * SLACK) as worker,
        pytest.raises(ProtocolError, match="sent more than it was asked for"),
    ):
        RemoteChannel(worker.endpoint, hello(), connect_timeout=TIMEOUT)


class FullSocket:
    """Takes nothing, and gives up once too much has come."""

    def __init__(self, inflow: Inflow) -> None:
        self._inflow = inflow

    def send(self, *_: object) -> None:
        assert eventually(lambda: self._inflow.is_over)
        raise zmq.Again


def test_a_send_that_fails_as_the_guard_ends_the_link_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FloodingWorker(welcomes=True) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), connect_timeout=TIMEOUT)
        monkeypatch.setattr(channel._socket, "_socket", FullSocket(channel._socket.inflow))
        monkeypatch.setattr(channel._socket, "_events", lambda: 0)  # of the check before the send
        with pytest.raises(ProtocolError, match="sent more than it was asked for"):
            channel._socket.send([b""])
        monkeypatch.undo()
        channel.close()


def test_the_answers_that_were_asked_for_may_be_large(socket_path: Path | None) -> None:
    address = "tcp://127.0.0.1:0" if socket_path is None else f"ipc://{socket_path}"
    large = torch.arange(SLACK // 4)  # twice what comes unasked
    with WorkerThread(address) as worker:
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        for _ in range(2):
            tickets = [begin(channel, large) for _ in range(2)]
            time.sleep(0.15)  # several looks, before anything is received
            assert all(torch.equal(finish(channel, ticket)[0], large) for ticket in tickets)
        channel.close()


class Holding(CountingProxy):
    """Passes on so much in each direction, and then nothing: a message stays without its end."""

    def __init__(self, target: Endpoint, most: int) -> None:
        super().__init__(target)
        self._most = most

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        try:
            while data := source.recv(2**16):
                passed += len(data)
                if passed < self._most:
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture
def patient_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a guard ends a connection that is held: no heartbeat that is missed does it first."""
    monkeypatch.setattr(tsqp.wire.zmq, "SILENCE_MS", 10**6)


def test_an_encrypted_link_is_bounded_for_the_trusted_side(patient_heartbeats: None) -> None:
    def flood(ticket: int) -> list[bytes]:
        return [encode(Result(1), ticket), *[bytes(MIB)] * 32]

    liar = LyingWorker(flood)
    liar.encrypt(SECRET)
    with liar, Holding(liar.endpoint, 16 * MIB) as proxy, memory_stays_below(BOUND):
        channel = RemoteChannel(proxy.endpoint, hello(), worker_key=PUBLIC)
        ticket = begin(channel, torch.ones(3))
        with pytest.raises(ProtocolError, match="sent more than it was asked for"):
            finish(channel, ticket)


def test_a_worker_hangs_up_on_a_client_that_floods_and_serves_on(
    low_limit: None, busy: WorkerThread
) -> None:
    with memory_stays_below(BOUND):
        clients = [
            threading.Thread(target=flood_worker, args=(str(busy.endpoint),)) for _ in range(2)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(TIMEOUT)
            assert not client.is_alive()  # it was hung up on


def test_empty_frames_do_not_fill_the_memory(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq takes 32 times as much memory for them as there are bytes on the wire."""
    before = psutil.Process().memory_info().rss
    room = 400 * MIB
    monkeypatch.setattr(
        tsqp.wire.peers,
        "available_bytes",
        lambda: max(0, room - (psutil.Process().memory_info().rss - before)),
    )
    with (
        WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker,
        memory_stays_below(2 * room),
    ):
        flood_worker(str(worker.endpoint), EMPTY)
        channel = RemoteChannel(worker.endpoint, hello())
        finish(channel, begin(channel, torch.ones(3)))
        channel.close()


class Busy(Echo):
    """Computes until it may end."""

    may_end = threading.Event()

    def run(self, *arguments: Any) -> None:
        self.may_end.wait(4 * TIMEOUT)
        super().run(*arguments)


def test_a_worker_hangs_up_on_a_client_that_floods_while_it_computes(
    low_limit: None, shm_folder: Path
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", Busy(), shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello())
        ticket = begin(channel, torch.ones(3))
        client = threading.Thread(target=flood_worker, args=(str(worker.endpoint),))
        client.start()
        client.join(TIMEOUT)
        assert not client.is_alive()  # it was hung up on
        Busy.may_end.set()
        finish(channel, ticket)
        channel.close()


def test_an_encrypted_link_is_bounded_for_a_worker(
    low_limit: None, patient_heartbeats: None, shm_folder: Path
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", secret_key=SECRET, shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello(), worker_key=PUBLIC)
        with (
            Holding(worker.endpoint, 8 * MIB) as proxy,
            memory_stays_below(BOUND),
            RawClient(proxy.endpoint, server_key=PUBLIC) as client,
        ):
            assert isinstance(client.shake_hands(shm_bytes=0), Welcome)
            assert eventually(lambda: len(worker.server.sessions) == 2)
            client.send(*[bytes(MIB)] * 16)
            assert eventually(lambda: len(worker.server.sessions) == 1)
        assert echoes(channel)
        channel.close()


CONNECT = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as peer:
    peer.settimeout(20)
    peer.connect("\\0" + sys.argv[1])
    try:
        while peer.recv(1000):
            pass
        print("hung up")
    except ConnectionError:
        print("hung up")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to be another user")
def test_over_ipc_another_user_is_hung_up_on(shm_folder: Path) -> None:
    name = f"tsqp-test-{secrets.token_hex(8)}"
    with WorkerThread(f"ipc://@{name}", shm_folder=shm_folder) as worker:
        channel = RemoteChannel(worker.endpoint, hello())
        done = subprocess.run(
            [sys.executable, "-c", CONNECT, name], capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "hung up\n", done.stderr
        assert echoes(channel)
        channel.close()


def test_a_relay_takes_no_connection_but_its_own(tmp_path: Path) -> None:
    with WorkerThread(f"ipc://{tmp_path}/socket") as worker:
        relay = Relay(worker.endpoint, Inflow(SLACK), time.monotonic() + TIMEOUT)
        name = relay.endpoint.removeprefix("ipc://@")
        intruder = subprocess.Popen(
            [sys.executable, "-c", INTRUDE, name], stdout=subprocess.PIPE, text=True
        )
        assert intruder.stdout is not None
        assert intruder.stdout.readline() == "connected\n"
        context = zmq.Context()
        ours = context.socket(zmq.DEALER)
        ours.connect(relay.endpoint)
        relay.begin()
        assert intruder.stdout.readline() == "hung up\n"
        intruder.communicate(timeout=TIMEOUT)
        ours.close(linger=0)
        context.term()
        relay.close()
        relay.close()


INTRUDE = """
import socket, sys
with socket.socket(socket.AF_UNIX) as peer:
    peer.settimeout(20)
    peer.connect("\\0" + sys.argv[1])
    print("connected", flush=True)
    try:
        print("hung up" if not peer.recv(1) else "served")
    except ConnectionError:
        print("hung up")
"""


@pytest.mark.parametrize("secret_key", [None, SECRET], ids=["plain", "encrypted"])
def test_every_byte_of_a_received_frame_is_counted(secret_key: str | None) -> None:
    """Else a long session would come near its limit, or a flood would be allowed."""
    with WorkerThread("tcp://127.0.0.1:0", secret_key=secret_key) as worker:
        key = None if secret_key is None else PUBLIC
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0), worker_key=key)
        for length in (1, 14, 15, 55, 56, 63, 64, 65, 20_000) * 20:  # of four bytes each
            finish(channel, begin(channel, torch.ones(length)))
        guard = channel._socket._guard
        assert isinstance(guard, Guard)
        peers = worker.server._socket._peers
        [(descriptor, connection)] = peers._connections.items()
        theirs = peers.inflow(descriptor)
        assert theirs is not None
        for excess, limit in (
            (channel._socket.inflow.excess(connection=guard._connection), SLACK),
            (theirs.excess(connection=connection), 0),
        ):
            assert 0 < excess + limit < 2000  # the handshake and heartbeats
        channel.close()
