"""Encrypted links: who gets through, who does not, and what each is told."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from wire_helpers import SHARED, TIMEOUT, WorkerThread, begin, echoes, eventually, finish, hello

from tsqp.errors import HandshakeError, WorkerLost
from tsqp.wire.client import RemoteChannel, check_reachable
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.zmq import is_key, new_key_pair, public_key_of

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CONNECT_S = TIMEOUT
MARK = b"nobody but the two ends may read this "

PUBLIC, SECRET = new_key_pair()
OTHER_PUBLIC, _ = new_key_pair()


@pytest.fixture(params=["tcp", "ipc"])
def address(request: pytest.FixtureRequest) -> str:
    return "tcp://127.0.0.1:0" if request.param == "tcp" else f"ipc://@tsqp-{os.urandom(8).hex()}"


def connect(endpoint: Endpoint, key: str | None, shm_bytes: int = 0) -> RemoteChannel:
    wanted = hello(shm_bytes=shm_bytes)
    return RemoteChannel(endpoint, wanted, worker_key=key, connect_timeout=CONNECT_S)


def refusals(endpoint: Endpoint, key: str | None) -> set[str]:
    """What is said by the first look and by the session itself, several times."""
    said = set()
    for attempt in range(10):
        with pytest.raises(HandshakeError) as caught:
            if attempt % 2:
                check_reachable(endpoint, key, CONNECT_S)
            else:
                connect(endpoint, key)
        said.add(str(caught.value))
    return said


def test_keys_come_in_pairs() -> None:
    assert is_key(PUBLIC)
    assert is_key(SECRET)
    assert public_key_of(SECRET) == PUBLIC
    assert len({PUBLIC, SECRET, OTHER_PUBLIC}) == 3


@pytest.mark.parametrize(
    "text",
    ["", PUBLIC[1:], PUBLIC + "0", PUBLIC[:-1] + "~", "é" * 40, "#" * 40, " " * 40],
    ids=["none", "short", "long", "no digit", "no ASCII", "too large", "blank"],
)
def test_what_has_not_the_form_of_a_key_is_none(text: str) -> None:
    assert not is_key(text)


@pytest.mark.parametrize("shm_bytes", [0, 2**20], ids=["inline", SHARED])
def test_with_the_worker_s_key_calls_are_answered(address: str, shm_bytes: int) -> None:
    with WorkerThread(address, secret_key=SECRET) as worker:
        channel = connect(worker.endpoint, PUBLIC, shm_bytes)
        assert channel.transport == (SHARED if shm_bytes else "inline")
        assert all(echoes(channel, value) for value in range(20))
        sent = torch.arange(2**20)
        assert torch.equal(finish(channel, begin(channel, sent))[0], sent)
        channel.close()


def test_another_key_than_the_worker_s_is_refused(address: str) -> None:
    with WorkerThread(address, secret_key=SECRET) as worker:
        assert refusals(worker.endpoint, OTHER_PUBLIC) == {
            f"The worker at {worker.endpoint} does not hold the secret key that belongs to this "
            "--worker-key; check the key, which the worker shows when it starts, and the endpoint."
        }
        assert serves(worker)


def test_without_a_key_a_worker_that_has_one_is_out_of_reach(address: str) -> None:
    with WorkerThread(address, secret_key=SECRET) as worker:
        assert refusals(worker.endpoint, None) == {
            f"The worker at {worker.endpoint} accepts only encrypted links; give its public key, "
            "which it shows when it starts, as --worker-key."
        }
        assert serves(worker)


def test_a_key_for_a_worker_that_has_none_is_refused(address: str) -> None:
    with WorkerThread(address) as worker:
        assert refusals(worker.endpoint, PUBLIC) == {
            f"The worker at {worker.endpoint} does not encrypt, and a --worker-key was given for "
            "it; start it with --keyfile, or leave --worker-key out."
        }


def serves(worker: WorkerThread) -> bool:
    channel = connect(worker.endpoint, PUBLIC)
    try:
        return echoes(channel)
    finally:
        channel.close()


def test_many_who_are_refused_do_not_disturb_a_session() -> None:
    with WorkerThread("tcp://127.0.0.1:0", secret_key=SECRET) as worker:
        channel = connect(worker.endpoint, PUBLIC)
        for key in (None, OTHER_PUBLIC):
            refusals(worker.endpoint, key)
            assert echoes(channel)
        assert len(worker.server.sessions) == 1
        channel.close()


class Wiretap:
    """Somebody on the way between two ends, who sees all bytes and may change them."""

    def __init__(self, target: Endpoint) -> None:
        self.seen = bytearray()
        self.change: Callable[[bytes], bytes] = lambda data: data
        self._target = (target.host, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = parse_endpoint(f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, TIMEOUT)
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pass_on, args=pair))
                    self._threads[-1].start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.seen += data
                sink.sendall(self.change(data))
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT)
        for each in self._sockets:
            each.close()


@contextmanager
def tapped(secret_key: str | None) -> Iterator[tuple[Wiretap, RemoteChannel]]:
    """A session whose link somebody listens to."""
    with WorkerThread("tcp://127.0.0.1:0", secret_key=secret_key) as worker:
        tap = Wiretap(worker.endpoint)
        try:
            channel = connect(tap.endpoint, PUBLIC if secret_key else None)
            yield tap, channel
            channel.close()
            assert eventually(lambda: not worker.server.sessions)
        finally:
            tap.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_on_an_encrypted_link_nobody_reads_messages_or_tensors(encrypted: bool) -> None:
    sent = torch.frombuffer(bytearray(MARK * 8), dtype=torch.uint8).view(torch.float32)
    with tapped(SECRET if encrypted else None) as (tap, channel):
        assert torch.equal(finish(channel, begin(channel, sent))[0], sent)
        seen = bytes(tap.seen)
    for secret in (MARK, b"hello", b"linear"):
        assert (secret in seen) is not encrypted  # so that the tap is known to work
    assert len(seen) > 2 * len(MARK * 8)


def test_on_an_encrypted_link_nobody_changes_an_answer() -> None:
    with tapped(SECRET) as (tap, channel):
        assert echoes(channel)
        tap.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(WorkerLost, match=r"is gone|stopped answering"):
            finish(channel, begin(channel, torch.ones(100)), timeout=2)


def test_an_encrypted_session_is_not_taken_over_by_whoever_comes_next() -> None:
    with tapped(SECRET) as (tap, channel):
        assert echoes(channel)
        first = bytes(tap.seen)
        with socket.create_connection(tap._target, TIMEOUT) as replaying:
            replaying.sendall(first)  # what the client has said, and the worker's words in between
            time.sleep(0.2)
        assert echoes(channel)
