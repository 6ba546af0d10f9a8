"""Relays bytes between libzmq and a worker's Unix socket, and counts the incoming ones.

The kernel does not count the bytes of Unix sockets, so two threads of the TEE do, see
`tsqp.wire.inflow`. With shared memory, almost no data goes through the socket. Linux only.
"""

import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress

from tsqp.errors import WorkerUnavailable
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.greeting import connect
from tsqp.wire.inflow import END_S, Inflow, peer_of, shut_down

CHUNK = 2**18
RETRY_S = 0.1
CAN_RELAY = sys.platform == "linux"  # for abstract socket names


class Relay:
    """Connects libzmq to a worker's socket.

    Attributes:
        endpoint: the endpoint to which libzmq connects, once.
    """

    def __init__(self, worker: Endpoint, inflow: Inflow, deadline: float) -> None:
        """Connect to `worker`.

        Raises:
            WorkerUnavailable: nobody listens there before `deadline` (of time.monotonic).
        """
        self._inflow = inflow
        self._threads: list[threading.Thread] = []
        self._ours: socket.socket | None = None
        self._worker = _reach(worker, deadline)
        try:
            self._worker.settimeout(None)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except BaseException:
            self._worker.close()
            raise
        try:
            name = f"@tsqp-relay-{secrets.token_hex(16)}"
            self._listener.bind("\0" + name[1:])
            self._listener.listen()
            self._listener.settimeout(1.0)
            self.endpoint = f"ipc://{name}"
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Accept the connection of this process's libzmq, and no other connection.

        Raises:
            WorkerUnavailable: it does not connect.
        """
        while self._ours is None:
            try:
                connection, _ = self._listener.accept()
            except OSError as exc:
                raise WorkerUnavailable(f"Cannot relay a connection: {exc}.") from exc
            if peer_of(connection)[0] == os.getpid():
                self._ours = connection
            else:
                connection.close()
        self._listener.close()
        for name, source, sink, counted in (
            ("tsqp-relay-in", self._worker, self._ours, True),
            ("tsqp-relay-out", self._ours, self._worker, False),
        ):
            thread = threading.Thread(
                target=self._pump, args=(source, sink, counted), name=name, daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        buffer, total = memoryview(bytearray(CHUNK)), 0
        with suppress(OSError):  # one end is gone: close the other one too
            while length := source.recv_into(buffer):
                total += length
                if counted and self._inflow.excess(total) > 0:
                    self._inflow.is_over = True
                    break
                sink.sendall(buffer[:length])
        shut_down(source)
        shut_down(sink)

    def close(self) -> None:
        """End both connections and the threads; safe to call twice."""
        ends = [end for end in (self._worker, self._ours) if end is not None]
        for end in ends:
            shut_down(end)
        for thread in self._threads:
            thread.join(END_S)
        for end in (*ends, self._listener):
            end.close()


def _reach(worker: Endpoint, deadline: float) -> socket.socket:
    while True:
        try:
            return connect(worker, deadline)
        except OSError as exc:
            if time.monotonic() + RETRY_S >= deadline:
                raise WorkerUnavailable(no_worker_at(worker)) from exc
        time.sleep(RETRY_S)


def no_worker_at(endpoint: Endpoint | str) -> str:
    """The message for an endpoint where nobody listens in time."""
    return (
        f"No worker answers at {endpoint}; start one with "
        f"`tsqp worker MODEL --listen {endpoint}`, or correct --worker."
    )
