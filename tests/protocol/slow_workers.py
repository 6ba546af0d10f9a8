"""FAKE workers and links that are slow on purpose, each in one way."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_integers
from tsqp.model.config import layer_groups
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Hello, Operation, Product, place_of
from tsqp.wire.server import Server
from tsqp.wire.tensors import Spec

MODEL = "random:tiny"


class SlowWorker(Worker):
    """Sleeps before it multiplies, as long as `delay_s` says for a number of rows."""

    delay_s: Callable[[int], float]

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        time.sleep(self.delay_s(len(outputs[0])))
        super().run(operation, inputs, outputs)


@contextmanager
def slow_worker(endpoint: str, delay_s: Callable[[int], float]) -> Iterator[str]:
    """A worker of the private modes in a thread; gives its endpoint."""
    checkpoint = open_checkpoint(MODEL)
    worker = SlowWorker(None, load_integers(checkpoint, CpuBackend()))
    checkpoint.close()
    worker.delay_s = delay_s
    server = Server(parse_endpoint(endpoint))
    with _thread(lambda stop: server.serve(worker, stop.is_set)):
        yield server.address
    server.close()


@contextmanager
def busy_neighbour(endpoint: str, hello: Hello, rows: int) -> Iterator[None]:
    """Another client of a worker, which asks for one product after the other."""
    checkpoint = open_checkpoint(MODEL)
    qkv = layer_groups(checkpoint.config, 0).qkv
    checkpoint.close()
    operation = Product(*place_of(qkv), "wide")
    shapes = [Spec((rows, 4 * size), torch.uint8) for size in (qkv.width, qkv.features)]
    begun = threading.Event()

    def ask(stop: threading.Event) -> None:
        channel = RemoteChannel(parse_endpoint(endpoint), hello)
        while not stop.is_set():
            slot = channel.reserve(operation, shapes[:1], shapes[1:])
            slot.inputs[0].zero_()
            ticket = channel.submit(slot)
            begun.set()
            with channel.wait(ticket, time.monotonic() + 30):
                pass
        channel.close()

    with _thread(ask):
        assert begun.wait(30)
        yield


@contextmanager
def slow_link(endpoint: str, delay_s: float) -> Iterator[str]:
    """A TCP proxy that holds everything back for a while; gives its endpoint."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = []
    pumps: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            ends.extend((client, server))
            for pair in ((client, server), (server, client)):
                pumps.append(threading.Thread(target=_pump, args=(*pair, delay_s)))
                pumps[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in (listener, *ends):
            _shut(each)
        for thread in (acceptor, *pumps):
            thread.join(10)
            assert not thread.is_alive()
        for each in (listener, *ends):
            each.close()


def _pump(source: socket.socket, sink: socket.socket, delay_s: float) -> None:
    try:
        while data := source.recv(2**20):
            time.sleep(delay_s)
            sink.sendall(data)
    except OSError:
        pass  # one of them is closed, so is the other now
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already


@contextmanager
def _thread(run: Callable[[threading.Event], None]) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(40)
        assert not thread.is_alive()
