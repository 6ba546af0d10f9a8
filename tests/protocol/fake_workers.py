"""FAKE workers: each accepts a client, and fails it in its own way."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

from tsqp.wire.codec import HEADER, MAGIC, encode, worker_decoder
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, Welcome

Answer = Callable[[bytes], bytes | None]


@contextmanager
def deaf_socket() -> Iterator[str]:
    """Accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def fake_worker(answer: Answer) -> Iterator[str]:
    """Speaks ZeroMQ, and answers each message as `answer` says, or not at all."""
    ended = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def serve() -> None:
            while not ended.is_set():
                if router.poll(50):
                    identity, frame, *_ = router.recv_multipart()
                    if (reply := answer(frame)) is not None:
                        router.send_multipart([identity, reply])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{port}"
        finally:
            ended.set()
            thread.join()


def silence(frame: bytes) -> bytes | None:
    """Never answers."""
    return None


def silence_after_welcome(frame: bytes) -> bytes | None:
    """Agrees to everything in the handshake, and then never answers."""
    _, message = worker_decoder().decode(frame)
    if not isinstance(message, Hello):
        return None
    hello = message
    return encode(
        Welcome(hello.nonce, hello.weights_digest, hello.dtype, hello.abilities, "cpu", 2**40, None)
    )


def newer_version(frame: bytes) -> bytes | None:
    """Speaks a later version of the protocol."""
    return HEADER.pack(MAGIC, PROTOCOL_VERSION + 1, 0, 0, 0)
