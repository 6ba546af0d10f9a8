"""A peer whose message never ends is hung up on, before it fills the memory."""

import errno
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from wire_floods import FloodingWorker, flood_worker, memory_stays_below
from wire_helpers import TIMEOUT, Echo, WorkerThread, begin, echoes, eventually, finish, hello
from wire_peers import CountingProxy, LyingWorker, RawClient

import tsqp.wire.inflow
import tsqp.wire.peers
from tsqp.errors import ProtocolError
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.inflow import SLACK, Inflow
from tsqp.wire.messages import Result, Welcome
from tsqp.wire.peers import Peers
from tsqp.wire.relay import Relay
from tsqp.wire.zmq import new_key_pair

pytestmark = pytest.mark.usefixtures("nothing_is_left")

MIB = 2**20
BOUND = 300 * MIB  # a flood that nobody stops passes it in two seconds
PUBLIC, SECRET = new_key_pair()


@pytest.fixture(autouse=True)
def exact_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more for heartbeats, which would depend on how fast this machine is."""
    monkeypatch.setattr(tsqp.wire.inflow, "IDLE_BYTES_S", 0)


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


def test_an_encrypted_link_is_bounded_for_the_trusted_side() -> None:
    liar = LyingWorker(lambda ticket: [encode(Result(1), ticket), *[bytes(MIB)] * 32])
    liar.encrypt(SECRET)
    with liar, Holding(liar.endpoint, 16 * MIB) as proxy, memory_stays_below(BOUND):
        channel = RemoteChannel(proxy.endpoint, hello(), worker_key=PUBLIC)
        inflow = channel._socket.inflow
        # Else all 16 MiB may come before the guard looks, as if they belonged to the welcome.
        assert eventually(lambda: inflow._seen == inflow.messages)
        ticket = begin(channel, torch.ones(3))
        with pytest.raises(ProtocolError, match="sent more than it was asked for"):
            finish(channel, ticket)


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsqp.wire.peers, "MAX_INFLOW", MIB)


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


def test_an_encrypted_link_is_bounded_for_a_worker(low_limit: None, shm_folder: Path) -> None:
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


def test_all_connections_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that brought most goes first, and only as many as must go."""
    listener = socket.create_server(("127.0.0.1", 0))
    peers = Peers()
    monkeypatch.setattr(peers, "_most", 5000)
    ends = []
    for count in (1000, 3000, 2000):
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        peers.meet(theirs.fileno())
        ours.sendall(bytes(count))
        assert len(theirs.recv(count, socket.MSG_WAITALL)) == count
        ends.append((ours, theirs))
    peers.look()
    assert len(peers) == 2
    assert ends[1][0].recv(1) == b""
    peers.look()
    assert len(peers) == 2
    peers.received_message(ends[2][1].fileno())
    peers.look()
    ends[2][0].sendall(bytes(3500))
    ends[2][1].recv(3500, socket.MSG_WAITALL)
    peers.look()  # 1000 and 3500: the 2000 before have been received
    assert len(peers) == 2
    peers.close()
    for pair in ends:
        for end in pair:
            end.close()
    listener.close()


def test_what_waits_in_the_kernel_does_not_count(low_limit: None) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as ours, listener.accept()[0] as theirs:
        peers = Peers()
        peers.meet(theirs.fileno())
        ours.setblocking(False)
        sent = 0
        try:
            while sent < 16 * MIB:
                sent += ours.send(bytes(2**16))
        except BlockingIOError:
            pass
        assert sent > MIB
        peers.look()
        assert len(peers) == 1
        peers.close()
    listener.close()


def test_a_limit_that_is_lowered_belongs_to_a_message_that_was_seen() -> None:
    inflow = Inflow(10)
    inflow.expect(100)
    assert inflow.excess(110) == 0
    assert inflow.excess(111) == 1
    inflow.received_message()
    inflow.expect(-100)
    assert inflow.excess(111) == -10
    assert inflow.excess(121) == 0
    assert inflow.excess(122) == 1


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


def test_heartbeats_of_an_idle_connection_are_no_endless_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.undo()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    inflow = Inflow(SLACK)
    assert inflow.excess(0) < 0
    now += 7 * 24 * 3600
    assert inflow.excess(100 * 7 * 24 * 3600) < 0, "a week of heartbeats with CURVE"
    now += 1
    assert inflow.excess(2**40) > 0


def test_a_connection_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor_left(descriptor: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tsqp.wire.peers, "duplicate", no_descriptor_left)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peers = tsqp.wire.peers.Peers()
        peers.meet(ours.fileno())
        assert theirs.recv(1) == b""
        assert len(peers) == 0
        assert ours.fileno() >= 0, "the descriptor is still libzmq's"
        ours.getsockname()


def test_one_connection_is_bounded_by_itself(low_limit: None) -> None:
    """However much all of them together may bring."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peers = Peers()
        with closing(peers), socket.create_connection(listener.getsockname()) as ours:
            theirs, _ = listener.accept()
            with theirs:
                peers.meet(theirs.fileno())
                for sent, watched in ((MIB, 1), (1, 0)):
                    ours.sendall(bytes(sent))
                    assert len(theirs.recv(sent, socket.MSG_WAITALL)) == sent
                    peers.look()
                    assert len(peers) == watched
                assert ours.recv(1) == b"", "it was hung up on"


VISIT = """
import os, socket, sys
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(5)
connection.connect("\\0" + sys.argv[1])
try:
    print("hung up" if connection.recv(1) == b"" else "served")
except TimeoutError:
    print("let in")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to be another user")
def test_a_unix_connection_of_another_user_is_not_let_in() -> None:
    """Without libzmq, which hangs up on silent peers by itself."""
    name = f"tsqp-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        visitor = subprocess.Popen(
            [sys.executable, "-c", VISIT, name], stdout=subprocess.PIPE, text=True
        )
        theirs, _ = listener.accept()
        with theirs:
            Peers().meet(theirs.fileno())
            assert visitor.communicate(timeout=60)[0] == "hung up\n"
