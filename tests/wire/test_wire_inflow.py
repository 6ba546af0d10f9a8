"""Bytes that came and were not received as messages are counted and bounded: without libzmq."""

import errno
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing

import pytest

import tsqp.wire.peers
from tsqp.wire.inflow import SLACK, Guard, Inflow
from tsqp.wire.peers import Peers

pytestmark = pytest.mark.usefixtures("exact_counts")

MIB = 2**20
FRAME_HEADER = 9  # of a frame of more than 255 bytes


def test_a_guard_that_is_closed_looks_a_last_time(rare_looks: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inflow = Inflow(10)
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        with ours, theirs:
            guard = Guard(theirs.fileno(), inflow)
            ours.sendall(bytes(11))
            assert len(theirs.recv(11, socket.MSG_WAITALL)) == 11
            guard.close()
            assert inflow.is_over


def test_all_connections_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that brought most goes first, and only as many as must go."""
    listener = socket.create_server(("127.0.0.1", 0))
    peers = Peers()
    monkeypatch.setattr(peers, "_most", 5000)
    ends = []
    for count in (1000, 3000, 2000):
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        peers.add(theirs.fileno())
        ours.sendall(bytes(count))
        assert len(theirs.recv(count, socket.MSG_WAITALL)) == count
        ends.append((ours, theirs))
    peers.look()
    assert len(peers) == 2
    assert ends[1][0].recv(1) == b""
    peers.look()
    assert len(peers) == 2
    inflow = peers.inflow(ends[2][1].fileno())
    assert inflow is not None
    inflow.received_frame(2000 - FRAME_HEADER)
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


def test_when_memory_is_short_the_connection_that_brought_most_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 100 * MIB
    monkeypatch.setattr(tsqp.wire.peers, "available_bytes", lambda: free)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        peers = stack.enter_context(closing(Peers()))
        ends = []
        for count in (SLACK, SLACK + 2, SLACK + 1):
            ours = stack.enter_context(socket.create_connection(listener.getsockname()))
            theirs = stack.enter_context(listener.accept()[0])
            peers.add(theirs.fileno())
            sender = threading.Thread(target=ours.sendall, args=(bytes(count),))
            sender.start()
            assert len(theirs.recv(count, socket.MSG_WAITALL)) == count
            sender.join()
            ends.append(ours)
        peers.look()
        assert len(peers) == 3
        free = 24 * MIB  # less than a quarter of what was free before
        for left, ended in ((2, ends[1]), (1, ends[2])):
            peers.look()
            assert len(peers) == left
            assert ended.recv(1) == b""
        peers.look()
        assert len(peers) == 1, "it brought no more than anybody may"


def test_what_waits_in_the_kernel_does_not_count(low_limit: None) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as ours, listener.accept()[0] as theirs:
        peers = Peers()
        peers.add(theirs.fileno())
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


def test_what_was_received_does_not_count_and_what_is_unread_does() -> None:
    inflow = Inflow(10)
    inflow.expect(500)
    assert inflow.excess(510) == 0
    assert inflow.excess(511) == 1
    inflow.received_frame(500)
    inflow.expect(-500)
    assert inflow.excess(511) == 511 - 510 - FRAME_HEADER
    for _ in range(100):  # small messages, one of which is received for each two that come
        inflow.received_frame(98)
    assert inflow.excess(511 + 100 * 200) == 511 + 100 * 200 - 510 - FRAME_HEADER - 100 * 100


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


def test_an_idle_connection_saves_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.undo()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    inflow = Inflow(SLACK)
    for second in range(0, 30 * 24 * 3600, 3600):
        now = 1000.0 + second
        assert inflow.excess(16 * second) < 0
    assert inflow.excess(16 * second + SLACK + 1) > 0


def test_a_connection_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor_left(descriptor: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tsqp.wire.peers, "duplicate", no_descriptor_left)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peers = tsqp.wire.peers.Peers()
        peers.add(ours.fileno())
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
                peers.add(theirs.fileno())
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
            Peers().add(theirs.fileno())
            assert visitor.communicate(timeout=60)[0] == "hung up\n"
