"""Peers that do nothing but answer, for timing what a call costs beside its work.

Run as a program, this is one of two: a worker that copies tensors, behind the server of every
worker, or the other side of a mailbox, which posts each frame again.
"""

import argparse
import secrets
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tsqp.errors import ProtocolError
from tsqp.gpu.ready import READY
from tsqp.gpu.serve import stop_at_end_of_input
from tsqp.runtime.local_worker import LocalWorker
from tsqp.wire.channel import Service
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.mailbox import MAILBOX_BYTES, Mailbox
from tsqp.wire.messages import Hello, Linear, Operation, Welcome
from tsqp.wire.server import Server
from tsqp.wire.shm import SealedSegment
from tsqp.wire.tensors import Spec

ECHO = Linear(0, "echo")
MOST_FLOATS = 2**21  # of an answer
DIGEST = "0" * 64  # there are no weights


def hello(shm_bytes: int) -> Hello:
    """The greeting of a client that wants so much shared memory."""
    return Hello(secrets.token_bytes(32), DIGEST, "float32", (), shm_bytes)


class EchoWorker(LocalWorker):
    """A worker that answers with its input, or with as many numbers as the answer has room for."""

    PROGRAM = ("-m", "tsqp.bench.echo")

    def __init__(self, listen: str | None = None) -> None:
        super().__init__([], listen)


class EchoMailbox(LocalWorker):
    """A process that takes each frame out of a segment's mailbox and posts it again."""

    PROGRAM = ("-m", "tsqp.bench.echo")

    def __init__(self, segment: SealedSegment) -> None:
        ref = segment.ref
        super().__init__(["--segment", str(ref.pid), str(ref.descriptor), str(ref.size)])


class EchoService:
    """A `tsqp.wire.channel.Service` and its own session."""

    def __init__(self) -> None:
        self._numbers = torch.ones(MOST_FLOATS)

    def welcome(self, hello: Hello) -> Welcome:
        return Welcome(hello.nonce, DIGEST, "float32", (), "cpu", 2**40, None)

    def open(self) -> "EchoService":
        return self

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        if operation != ECHO or len(inputs) != 1 or len(outputs) != 1:
            raise ProtocolError("An echo has one input and one output.")

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        [given], [wanted] = inputs, outputs
        same = given.shape == wanted.shape
        wanted.copy_(given if same else self._numbers[: wanted.shape[0]])

    def close(self) -> None:
        pass


def main() -> None:
    """Answer until the end of standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--segment", type=int, nargs=3)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--supervised", action="store_true", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stop = threading.Event()
    threading.Thread(target=stop_at_end_of_input, args=(stop,), daemon=True).start()
    if given.segment is not None:
        _echo_frames(SealedSegment.open(*given.segment), stop.is_set)
        return
    server = Server(parse_endpoint(given.listen))
    service: Service = EchoService()
    try:
        print(READY, server.address, flush=True)
        server.serve(service, stop.is_set)
    finally:
        server.close()


def _echo_frames(segment: SealedSegment, stop: Callable[[], bool]) -> None:
    mailbox = Mailbox(segment.memory(MAILBOX_BYTES), "worker")
    print(READY, "mailbox", flush=True)
    while not stop():
        while (frame := mailbox.take_soon()) is not None:
            mailbox.post(frame)
        mailbox.linger()


if __name__ == "__main__":
    main()
