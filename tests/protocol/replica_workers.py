"""Workers in threads of a test, which hold a shard each, and lie or rest as they are told."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from torch import Tensor

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_integers
from tsqp.model.shard import Shard
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Operation
from tsqp.wire.server import Server


class ToldWorker(Worker):
    """A worker whose calls a test sees.

    Attributes:
        received: the inputs of all calls.
        lies: whether it flips one bit of each answer.
        go: it answers nothing while this is cleared.
    """

    def __init__(self, model: str, shard: Shard) -> None:
        with closing(open_checkpoint(model)) as checkpoint:
            super().__init__(None, load_integers(checkpoint, CpuBackend(), shard=shard))
        self.received: list[bytes] = []
        self.lies = False
        self.go = threading.Event()
        self.go.set()

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self.received.append(inputs[0].numpy().tobytes())
        self.go.wait(10)
        super().run(operation, inputs, outputs)  # type: ignore[arg-type]
        if self.lies:
            outputs[0].view(-1)[-1] ^= 1


@contextmanager
def told_workers(
    folder: Path, model: str, *shards: str
) -> Iterator[tuple[list[str], list[ToldWorker]]]:
    """Workers with these shards, such as 1/2, and their endpoints."""
    stop = threading.Event()
    with ExitStack() as stack:
        ends, workers = [], []
        for place, shard in enumerate(shards):
            server = Server(parse_endpoint(f"ipc://{folder}/told{place}.sock"))
            stack.callback(server.close)
            worker = ToldWorker(model, Shard(*map(int, shard.split("/"))))
            thread = threading.Thread(target=server.serve, args=(worker, stop.is_set))
            thread.start()
            stack.callback(thread.join)
            stack.callback(worker.go.set)
            ends.append(server.address)
            workers.append(worker)
        stack.callback(stop.set)
        yield ends, workers
