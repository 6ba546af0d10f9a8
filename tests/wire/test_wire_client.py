"""Connecting to what is no worker, or not the right one."""

import socket
import time
from pathlib import Path

import pytest
from wire_helpers import DIGEST, Echo, WorkerThread, hello
from wire_peers import LyingWorker, TCPServer

import tsqp.wire.zmq
from tsqp.errors import HandshakeError, WorkerUnavailable
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import Endpoint, parse_endpoint

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def unavailable(endpoint: Endpoint, timeout: float) -> str:
    """What connecting says, in less time than a long timeout, or than a short one and a while."""
    start = time.monotonic()
    with pytest.raises(WorkerUnavailable) as caught:
        RemoteChannel(endpoint, hello(), connect_timeout=timeout)
    assert time.monotonic() - start < 60
    assert str(endpoint) in str(caught.value)
    return str(caught.value)


def test_a_missing_socket_is_named_with_what_to_do(tmp_path: Path) -> None:
    endpoint = parse_endpoint(f"ipc://{tmp_path}/absent")
    words = unavailable(endpoint, 0.5)
    assert words.startswith("No worker answers at")
    assert f"`tsqp worker MODEL --listen {endpoint}`" in words


def test_a_closed_port_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = unavailable(parse_endpoint(f"tcp://127.0.0.1:{port}"), 0.5)
    assert f"`tsqp worker MODEL --listen tcp://127.0.0.1:{port}`" in words


def test_a_host_that_does_not_exist_is_named() -> None:
    unavailable(parse_endpoint("tcp://no-such-host.invalid:5555"), 0.5)


@pytest.mark.parametrize(
    "endpoint", [Endpoint("tcp", "nonsense"), Endpoint("ipc", "x" * 200)], ids=["tcp", "ipc"]
)
def test_an_endpoint_that_zeromq_refuses_is_unavailable(endpoint: Endpoint) -> None:
    unavailable(endpoint, 0.5)


def refuse_politely(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.close()


def test_a_server_of_something_else_is_recognised_at_once() -> None:
    with TCPServer(refuse_politely) as server:
        assert "does not answer as a TSQP worker" in unavailable(server.endpoint, 120)


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad\r\n\r\n", b"\xff" * 1000, bytes(1000)])
def test_garbage_costs_no_more_than_the_timeout(garbage: bytes) -> None:
    with TCPServer(lambda connection: connection.sendall(garbage)) as server:
        unavailable(server.endpoint, 1)


def test_a_server_that_hangs_up_is_recognised_at_once() -> None:
    with TCPServer(lambda connection: connection.close()) as server:
        assert "does not answer as a TSQP worker" in unavailable(server.endpoint, 120)


def test_a_server_that_never_speaks_costs_no_more_than_the_timeout() -> None:
    with TCPServer(lambda connection: None) as server:
        assert "No worker answers" in unavailable(server.endpoint, 1)


def test_a_server_that_never_speaks_is_given_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tsqp.wire.zmq, "SILENCE_MS", 1000)
    with TCPServer(lambda connection: None) as server:
        assert "the worker hangs" in unavailable(server.endpoint, 120)


def test_a_worker_that_does_not_answer_the_handshake_may_still_be_loading() -> None:
    with LyingWorker(greeting=lambda nonce: None) as worker:
        words = unavailable(worker.endpoint, 0.5)
        assert "accepts connections but does not answer" in words
        assert "loading its model" in words


def test_a_worker_that_comes_up_late_is_found(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    with pytest.raises(WorkerUnavailable):
        RemoteChannel(parse_endpoint(endpoint), hello(), connect_timeout=0.3)
    with WorkerThread(endpoint):
        RemoteChannel(parse_endpoint(endpoint), hello(shm_bytes=0)).close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"weights_digest": "0" * 64},
            "worker holds other weights.*start both with the same model",
        ),
        (
            {"dtype": "bfloat16"},
            "worker computes in bfloat16 and this side in float32.*same --dtype",
        ),
        ({"abilities": ("other",)}, "worker cannot do linear; install the same tsqp version"),
    ],
)
def test_a_worker_of_something_else_is_refused_by_both_sides(
    changes: dict[str, object], words: str
) -> None:
    with (
        WorkerThread("tcp://127.0.0.1:0", Echo(**changes)) as worker,
        pytest.raises(HandshakeError, match=f"^Refused by the worker at tcp://.*: the {words}"),
    ):
        RemoteChannel(worker.endpoint, hello())

    def lie(nonce: bytes) -> list[bytes]:
        return [encode(Echo(**changes).welcome(hello(nonce=nonce)))]

    with (
        LyingWorker(greeting=lie) as liar,
        pytest.raises(
            HandshakeError, match=f"^Refused the worker at tcp://.*: the {words}"
        ) as caught,
    ):
        RemoteChannel(liar.endpoint, hello())
    assert DIGEST not in str(caught.value)


def test_a_worker_of_another_version_is_refused() -> None:
    def greeting(nonce: bytes) -> list[bytes]:
        return [b"TSQP\x04\x00" + bytes(14)]

    with (
        LyingWorker(greeting=greeting) as worker,
        pytest.raises(HandshakeError, match="version 4 and this side 3; install the same"),
    ):
        RemoteChannel(worker.endpoint, hello())
