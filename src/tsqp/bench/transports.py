"""Latency and bandwidth of each transport to a worker on this machine.

Used by `tsqp bench transport` and `tsqp doctor`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from statistics import quantiles
from time import monotonic, perf_counter
from typing import Self

import torch
from rich.table import Table

from tsqp.bench.hardware_limits import copy_bytes_per_s
from tsqp.bench.host import describe_machine
from tsqp.bench.output import new_table
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.runtime.links import Link
from tsqp.runtime.local_worker import LocalWorker
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.wire.channel import Channel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Embed
from tsqp.wire.tensors import Spec

MODEL = "random:tiny"
SHM_BYTES = 2**26
MANY_ROWS = 2**15
ANSWER_BYTES = 2**23  # bytes of MANY_ROWS rows
TIMEOUT_S = 10.0
LISTENING = {"ipc": None, "tcp": "tcp://127.0.0.1:0"}


@dataclass(frozen=True, slots=True)
class Transport:
    """The figures of one transport.

    Attributes:
        socket: "ipc" or "tcp".
        transport: name of the transport, as in `LLM.transport`.
        reason: why this transport was chosen.
        median_us, p99_us: round-trip time of a call for one embedding row.
        bytes_per_s: bandwidth of an answer of MANY_ROWS rows.
    """

    socket: str
    transport: str
    reason: str
    median_us: float
    p99_us: float
    bytes_per_s: float


class Ways:
    """Local workers with a tiny model, and the transports to them. A context manager.

    Raises:
        WorkerUnavailable: on entering, if a worker does not start.
    """

    def __init__(self) -> None:
        self._workers: dict[str, LocalWorker] = {}

    def __enter__(self) -> Self:
        self._checkpoint = open_checkpoint(MODEL)
        self._digest = weights_digest(self._checkpoint, torch.float32)
        arguments = [MODEL, "--serve", "open", "--dtype", "float32", "--threads", "1"]
        with ExitStack() as stack:
            workers = {name: LocalWorker(arguments, at) for name, at in LISTENING.items()}
            for worker in workers.values():
                stack.callback(worker.close)
            for worker in workers.values():
                worker.await_ready()
            self._stack = stack.pop_all()
        self._workers = workers
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        """All transports, as pairs: the socket, and whether memory is shared."""
        return product(self._workers, (True, False))

    def measure(self, socket: str, shared: bool, calls: int) -> Transport:
        """Measure one transport with `calls` calls for one row (at least 2)."""
        link = Link(parse_endpoint(self._workers[socket].endpoint), None)
        process = WorkerProcess(link, MODEL, torch.float32, None)
        try:
            reason = "" if shared else "not asked for"
            shm_bytes = SHM_BYTES if shared else 0
            channel = process.connect(self._checkpoint, self._digest, shm_bytes, reason)
            return _measure(socket, channel, self._checkpoint.config.hidden_size, calls)
        finally:
            process.close()


@dataclass(frozen=True, slots=True)
class TransportResult:
    """All transports, and the speed of a plain memory copy of the same size."""

    transports: list[Transport]
    calls: int
    answer_bytes: int
    copy_bytes_per_s: float
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure_transports(calls: int) -> TransportResult:
    """Measure every transport with `calls` calls for one row (at least 2).

    Raises:
        WorkerUnavailable: a worker does not start.
    """
    with Ways() as ways:
        found = [ways.measure(socket, shared, calls) for socket, shared in ways]
    copy = copy_bytes_per_s(ANSWER_BYTES)
    return TransportResult(found, calls, ANSWER_BYTES, copy, describe_machine())


def tables(result: TransportResult) -> Iterator[Table]:
    """One row for each transport."""
    table = new_table(
        "Calls to a worker", "socket", "transport", "µs", "p99, µs", "GB/s", "of copying"
    )
    for each in result.transports:
        table.add_row(
            each.socket, each.transport, f"{each.median_us:.0f}", f"{each.p99_us:.0f}",
            f"{each.bytes_per_s / 1e9:.2f}", f"{each.bytes_per_s / result.copy_bytes_per_s:.0%}",
        )  # fmt: skip
    yield table


def notes(result: TransportResult) -> Iterator[str]:
    """How it was measured, and the limit of the hardware."""
    yield (
        f"µs: a call for one row of an embedding, there and back, the median of {result.calls}. "
        f"GB/s: an answer of {result.answer_bytes >> 20} MiB; one core copies as much at "
        f"{result.copy_bytes_per_s / 1e9:.1f} GB/s."
    )


def _measure(socket: str, channel: Channel, width: int, calls: int) -> Transport:
    assert 4 * MANY_ROWS * width == ANSWER_BYTES
    _fetch(channel, 1, width)
    round_trips = quantiles([_fetch(channel, 1, width) for _ in range(calls)], n=100)
    large_s = min(_fetch(channel, MANY_ROWS, width) for _ in range(3))
    return Transport(
        socket=socket,
        transport=channel.transport,
        reason=channel.reason,
        median_us=1e6 * round_trips[49],
        p99_us=1e6 * round_trips[98],
        bytes_per_s=ANSWER_BYTES / large_s,
    )


def _fetch(channel: Channel, rows: int, width: int) -> float:
    """Seconds of a call for `rows` embedding rows."""
    inputs, outputs = Spec((rows,), torch.int64), Spec((rows, width), torch.float32)
    began = perf_counter()
    slot = channel.reserve(Embed(), [inputs], [outputs])
    slot.inputs[0].zero_()
    with channel.wait(channel.submit(slot), monotonic() + TIMEOUT_S):
        return perf_counter() - began
