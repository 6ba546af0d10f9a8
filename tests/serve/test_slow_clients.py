"""Clients that send or read too slowly, and connections that are too many."""

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_client import DEADLINE_S, Server
from serve_here import serving

from certificates import write_certificate
from tsqp import AsyncLLM, RequestStats
from tsqp.serve.connections import REFUSAL
from tsqp.serve.options import ServeOptions
from tsqp.serve.run import _listening
from tsqp.tee.sampler import Sampler

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
SOON = ServeOptions(header_timeout=0.5, send_timeout=1.0)


class Watcher:
    """Keeps how requests ended."""

    def __init__(self) -> None:
        self.stats: list[RequestStats] = []

    def first_token(self, seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def ended(self, stats: RequestStats) -> None:
        self.stats.append(stats)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers before it has the body, a megabyte for /large."""
    size = 2**20 if scope["path"] == "/large" else 5
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * size})


@pytest.fixture(scope="module")
def greeter() -> Iterator[Server]:
    with serving(SOON, app=hello) as server:
        yield server


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    link = socket.socket()
    link.settimeout(20)
    if receive_buffer is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    link.connect(("127.0.0.1", server.port))
    return link


def is_ended(link: socket.socket) -> bool:
    """Wait until the server ends the connection."""
    try:
        while link.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("sent", [b"", GET[:20], GET + GET[:20]], ids=["none", "half", "second"])
def test_a_header_that_does_not_come_ends_the_connection(greeter: Server, sent: bytes) -> None:
    with connect(greeter) as link:
        link.sendall(sent)
        assert is_ended(link)


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nx: ",
        GET + GET[:20],
        b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 99999\r\n\r\n",
    ],
    ids=["header", "second header", "body that nobody wants"],
)  # fmt: skip
def test_one_that_comes_byte_by_byte_ends_it_too(greeter: Server, first: bytes) -> None:
    with connect(greeter) as link:
        link.sendall(first)
        end = time.monotonic() + DEADLINE_S
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                link.sendall(b"a")
                time.sleep(0.02)


def test_a_client_in_time_keeps_its_connection(greeter: Server) -> None:
    with connect(greeter) as link:
        for _ in range(3):
            link.sendall(GET)
            answer = b""
            while not answer.endswith(b"xxxxx"):
                answer += link.recv(65536)
            time.sleep(0.15)


def test_a_slow_reader_that_goes_on_gets_everything(greeter: Server) -> None:
    with connect(greeter, 8192) as link:
        link.sendall(GET.replace(b"/ ", b"/large "))
        size = 0
        while size < 2**20:
            size += len(link.recv(2**16))
            time.sleep(0.003)


def test_an_answer_that_nobody_reads_ends_the_connection() -> None:
    with (
        serving(ServeOptions(send_timeout=0.3, max_connections=1), app=hello) as server,
        connect(server, 8192) as link,
    ):
        link.sendall(GET.replace(b"/ ", b"/large "))
        server.settles(lambda: _is_let_in(server))
        with pytest.raises(ConnectionResetError):  # and the kernel keeps none of it
            while link.recv(65536):
                pass


def test_a_client_that_reads_nothing_frees_its_sequence(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def slowly(sampler: Sampler, logits_V: Any) -> int:
        time.sleep(0.002)  # so that it does not end by itself before
        return sample(sampler, logits_V)

    monkeypatch.setattr(Sampler, "sample", slowly)
    watcher = Watcher()
    llm = AsyncLLM(str(model), privacy="tee", threads=1, observer=watcher)
    fields = {"prompt": [1, 2], "max_tokens": 4000, "ignore_eos": True, "logprobs": 20}
    body = json.dumps(fields | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    try:
        with serving(SOON, llm) as server, connect(server, 8192) as link:
            link.sendall(head.encode() + body)
            server.settles(lambda: bool(watcher.stats))
        [stats] = watcher.stats
        assert stats.finish_reasons == ("abort",)
    finally:
        llm.close()


def test_connections_beyond_the_maximum_are_refused_until_one_ends() -> None:
    with serving(ServeOptions(max_connections=2), app=hello) as server:
        kept = [connect(server) for _ in range(2)]
        for link in kept:
            link.sendall(GET)
            assert b" 200 " in link.recv(65536)
        with connect(server) as third:
            assert third.recv(65536).startswith(b"HTTP/1.1 503 ")
            assert is_ended(third)
        kept.pop().close()
        server.settles(lambda: _is_let_in(server))
        for link in kept:
            link.close()


def _is_let_in(server: Server) -> bool:
    with connect(server) as link:
        try:
            link.sendall(GET)
            return b" 200 " in link.recv(65536)
        except ConnectionError:
            return False


@pytest.mark.parametrize(
    ("attest", "said"), [(None, REFUSAL), ("simulated", b"")], ids=["plain", "attested TLS"]
)
def test_who_is_refused_is_told_so_unless_tls_is_expected(attest: str | None, said: bytes) -> None:
    with (
        _listening(ServeOptions(port=0, max_connections=1, attest=attest)) as listener,
        socket.create_connection(listener.getsockname()),
        socket.create_connection(listener.getsockname(), DEADLINE_S) as second,
    ):
        link, _ = listener.accept()
        listener.setblocking(False)
        with link, pytest.raises(BlockingIOError):
            listener.accept()
        assert second.recv(65536) == said


def test_a_handshake_that_does_not_come_ends_the_connection(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    options = ServeOptions(
        header_timeout=0.2, max_connections=1, ssl_certfile=certificate, ssl_keyfile=key
    )
    with serving(options, app=hello) as server:
        with connect(server) as link:
            with connect(server) as second:
                assert is_ended(second)  # handshakes count
            assert is_ended(link)
        context = ssl.create_default_context(cafile=str(certificate))

        def asked() -> bool:
            try:
                with context.wrap_socket(connect(server), server_hostname="localhost") as link:
                    link.sendall(GET)
                    return b" 200 " in link.recv(65536)
            except OSError:
                return False

        server.settles(asked)
