"""Latency and bandwidth of each transport to a worker on this machine.

Used by `tsqp bench transport` and `tsqp doctor`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from statistics import quantiles
from time import monotonic, perf_counter
from typing import Self

import torch
from rich.table import Table

from tsqp.bench.echo import ECHO, MOST_FLOATS, EchoMailbox, EchoWorker, hello
from tsqp.bench.hardware_limits import copy_bytes_per_s
from tsqp.bench.host import describe_machine
from tsqp.bench.output import new_table
from tsqp.errors import WorkerLost
from tsqp.wire.channel import Channel
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.mailbox import CAN_POLL, MAILBOX_BYTES, Mailbox
from tsqp.wire.shm import MIN_SEGMENT, SealedSegment
from tsqp.wire.tensors import Spec

SHM_BYTES = 2**26
FLOATS = 16  # of a small call, in each direction
CALL_BYTES = 4 * FLOATS
ANSWER_BYTES = 4 * MOST_FLOATS
BUSY_PART = 10  # with all cores busy, a part of the calls is enough: they take much longer
TIMEOUT_S = 10.0
LISTENING = {"ipc": None, "tcp": "tcp://127.0.0.1:0"}
BUSY = "import os, sys, threading\nthreading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)))"
BUSY += ".start()\nwhile True: pass"


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Round-trip times of many calls, in microseconds."""

    median_us: float
    p99_us: float

    @classmethod
    def of(cls, seconds: list[float]) -> Self:
        """The figures of at least two round trips."""
        found = quantiles(seconds, n=100)
        return cls(1e6 * found[49], 1e6 * found[98])


@dataclass(frozen=True, slots=True)
class Transport:
    """The figures of one transport.

    Attributes:
        socket: "ipc" or "tcp".
        transport: name of the transport, as in `LLM.transport`.
        reason: why this transport was chosen.
        median_us, p99_us: round-trip time of a call of CALL_BYTES in each direction.
        bytes_per_s: bandwidth of an answer of ANSWER_BYTES, which the worker copies once.
    """

    socket: str
    transport: str
    reason: str
    median_us: float
    p99_us: float
    bytes_per_s: float


class Ways:
    """Local workers that only copy, and the transports to them. A context manager.

    Raises:
        WorkerUnavailable: on entering, if a worker does not start.
    """

    def __init__(self) -> None:
        self._workers: dict[str, EchoWorker] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            workers = {name: EchoWorker(at) for name, at in LISTENING.items()}
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
        """Measure one transport with `calls` small calls (at least 2)."""
        with self._channel(socket, shared) as channel:
            found = RoundTrips.of(_small_calls(channel, calls))
            large_s = min(_call(channel, FLOATS, MOST_FLOATS) for _ in range(5))
            return Transport(
                socket=socket,
                transport=channel.transport,
                reason=channel.reason,
                median_us=found.median_us,
                p99_us=found.p99_us,
                bytes_per_s=ANSWER_BYTES / large_s,
            )

    def measure_busy(self, socket: str, shared: bool, calls: int) -> RoundTrips:
        """The same calls while other processes keep all cores busy."""
        with self._channel(socket, shared) as channel, _busy_cores():
            return RoundTrips.of(_small_calls(channel, calls))

    @contextmanager
    def _channel(self, socket: str, shared: bool) -> Iterator[Channel]:
        channel = RemoteChannel(
            parse_endpoint(self._workers[socket].endpoint),
            hello(SHM_BYTES if shared else 0),
            no_shm_reason="not asked for",
        )
        try:
            yield channel
        finally:
            channel.close()


@dataclass(frozen=True, slots=True)
class TransportResult:
    """All transports, and the speed of a plain memory copy of the same size.

    Attributes:
        transports: each transport.
        busy: round trips of each transport while all cores are busy.
        mailbox: a frame of CALL_BYTES through the mailbox only, there and back: what is left of a
            call without encoding, checks and tensors. None where there is no mailbox.
    """

    transports: list[Transport]
    busy: list[RoundTrips]
    mailbox: RoundTrips | None
    calls: int
    call_bytes: int
    answer_bytes: int
    copy_bytes_per_s: float
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure_transports(calls: int) -> TransportResult:
    """Measure every transport with `calls` small calls (at least 100).

    Raises:
        WorkerUnavailable: a worker does not start.
    """
    with Ways() as ways:
        found = [ways.measure(socket, shared, calls) for socket, shared in ways]
        busy = [ways.measure_busy(socket, shared, calls // BUSY_PART) for socket, shared in ways]
    return TransportResult(
        transports=found,
        busy=busy,
        mailbox=_mailbox_only(calls) if CAN_POLL else None,
        calls=calls,
        call_bytes=CALL_BYTES,
        answer_bytes=ANSWER_BYTES,
        copy_bytes_per_s=copy_bytes_per_s(ANSWER_BYTES),
        machine=describe_machine(),
    )


def tables(result: TransportResult) -> Iterator[Table]:
    """One row for each transport."""
    table = new_table(
        "Calls to a worker", "socket", "transport", "µs", "p99, µs", "busy, µs", "p99", "GB/s",
        "of copying",
    )  # fmt: skip
    for each, busy in zip(result.transports, result.busy, strict=True):
        table.add_row(
            each.socket, each.transport, f"{each.median_us:.1f}", f"{each.p99_us:.1f}",
            f"{busy.median_us:.0f}", f"{busy.p99_us:.0f}",
            f"{each.bytes_per_s / 1e9:.2f}", f"{each.bytes_per_s / result.copy_bytes_per_s:.0%}",
        )  # fmt: skip
    yield table


def notes(result: TransportResult) -> Iterator[str]:
    """How it was measured, and the limit of the hardware."""
    yield (
        f"µs: a call of {result.call_bytes} bytes, there and back, the median of {result.calls}. "
        "Busy: the same while other processes keep all cores busy. "
        f"GB/s: an answer of {result.answer_bytes >> 20} MiB; one core copies as much at "
        f"{result.copy_bytes_per_s / 1e9:.1f} GB/s."
    )
    if result.mailbox is not None:
        yield (
            f"The mailbox only, without the messages: {result.mailbox.median_us:.1f} µs there and "
            f"back, p99 {result.mailbox.p99_us:.1f}. The rest of a call is Python on both sides."
        )


def _small_calls(channel: Channel, calls: int) -> list[float]:
    _call(channel, FLOATS, FLOATS)
    return [_call(channel, FLOATS, FLOATS) for _ in range(calls)]


def _call(channel: Channel, given: int, wanted: int) -> float:
    """Seconds of a call with so many numbers in each direction."""
    inputs, outputs = (Spec((given,), torch.float32),), (Spec((wanted,), torch.float32),)
    began = perf_counter()  # the modes keep such descriptions, too
    slot = channel.reserve(ECHO, inputs, outputs)
    with channel.wait(channel.submit(slot), monotonic() + TIMEOUT_S):
        return perf_counter() - began


def _mailbox_only(calls: int) -> RoundTrips:
    segment = SealedSegment.create(MIN_SEGMENT)
    peer = EchoMailbox(segment)
    try:
        peer.await_ready()
        mailbox = Mailbox(segment.memory(MAILBOX_BYTES), "tee")
        frame = bytes(CALL_BYTES)
        return RoundTrips.of([_post(mailbox, frame) for _ in range(calls)])
    finally:
        peer.close()
        segment.close()


def _post(mailbox: Mailbox, frame: bytes) -> float:
    began = perf_counter()
    mailbox.post(frame)
    while mailbox.take_soon() is None:
        mailbox.linger()
        if perf_counter() - began > TIMEOUT_S:
            raise WorkerLost("The other side of the mailbox does not answer.")
    return perf_counter() - began


@contextmanager
def _busy_cores() -> Iterator[None]:
    """Processes that use all cores, and end with this one."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-I", "-c", BUSY], stdin=subprocess.PIPE)
            )
            stack.callback(process.kill)
        yield
