"""Asking a peer for its mechanism by hand."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from wire_helpers import WorkerThread

from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.greeting import ask_mechanism
from tsqp.wire.zmq import new_key_pair


@contextmanager
def dripping() -> Iterator[Endpoint]:
    """A peer that sends a byte of its greeting now and then."""
    ended = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            near, _ = listener.accept()
            with near:
                while not ended.wait(1):
                    near.send(b"\xff")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield parse_endpoint(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            ended.set()
            thread.join()


def test_a_peer_that_drips_is_not_waited_for_longer_than_one_that_is_silent() -> None:
    with dripping() as endpoint:
        began = time.monotonic()
        assert ask_mechanism(endpoint, 0.5) is None
        assert time.monotonic() - began < 30  # of the 64 that its greeting takes


@pytest.mark.parametrize("mechanism", ["NULL", "CURVE"])
def test_a_worker_names_its_mechanism(mechanism: str) -> None:
    secret = new_key_pair()[1] if mechanism == "CURVE" else None
    with WorkerThread("tcp://127.0.0.1:0", secret_key=secret) as worker:
        assert ask_mechanism(worker.endpoint, 5) == mechanism
