"""The interface between the TEE and one worker, and the in-process channel.

    slot = channel.reserve(operation, inputs, outputs)    # tensors to write into
    slot.inputs[0].copy_(x)
    ticket = channel.submit(slot)                          # the worker starts to compute
    with channel.wait(ticket, deadline) as reply:          # reply.outputs are valid only in here
        ...

Several tickets may be in flight. The channel belongs to one thread.
"""

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tsqp.errors import OutOfMemory, RemoteError, TSQPError, WorkerLost
from tsqp.wire.call_times import AWAY, MASK, WAIT, CallTimes, OnTimes, end_stage
from tsqp.wire.handshake import check_agreement
from tsqp.wire.messages import Hello, Operation, Welcome
from tsqp.wire.tensors import Spec


@dataclass(slots=True)
class Counters:
    """Traffic of one channel. Tensor bytes are counted whichever way they travel."""

    calls: dict[str, int] = field(default_factory=dict)  # by kind of operation
    sent_bytes: int = 0  # tensors, TEE → worker
    received_bytes: int = 0  # tensors, worker → TEE
    socket_bytes: int = 0  # frames both ways: messages, and inline tensors
    compute_s: dict[str, float] = field(default_factory=dict)  # as the workers report it, by kind

    @classmethod
    def total(cls, parts: Iterable["Counters"]) -> Self:
        """The total traffic of several channels."""
        total = cls()
        for each in parts:
            for kind, calls in each.calls.items():
                total.calls[kind] = total.calls.get(kind, 0) + calls
            for kind, seconds in each.compute_s.items():
                total.count_compute(kind, seconds)
            total.sent_bytes += each.sent_bytes
            total.received_bytes += each.received_bytes
            total.socket_bytes += each.socket_bytes
        return total

    def count_call(self, kind: str) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def count_compute(self, kind: str, seconds: float) -> None:
        self.compute_s[kind] = self.compute_s.get(kind, 0.0) + seconds


class Slot(Protocol):
    """A call being prepared: write the inputs, then submit."""

    times: CallTimes | None  # if there is a call log

    @property
    def inputs(self) -> Sequence[Tensor]: ...


class Reply(Protocol):
    """An answer. Its outputs may lie in shared memory and are valid only inside the `with` block.

    The end of the block ends the call's times, unless `times.end()` was called before.
    """

    times: CallTimes | None

    @property
    def outputs(self) -> Sequence[Tensor]: ...

    def __enter__(self) -> "Reply": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Channel(Protocol):
    """A session with one worker."""

    endpoint: str
    transport: str  # "inproc", "poll" and "shm" (shared memory), or "inline"
    reason: str  # why this transport
    counters: Counters
    welcome: Welcome
    on_times: OnTimes | None  # called with the times of each answered call; None to measure none

    @property
    def max_call_bytes(self) -> int:
        """Maximum bytes of inputs and outputs; a larger call should be split by rows."""
        ...

    def reserve(
        self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> Slot:
        """Reserve room for the tensors of a call; they are uninitialised."""
        ...

    def submit(self, slot: Slot) -> int:
        """Send a reserved call and return its ticket. The slot must not be used afterwards."""
        ...

    def discard(self, slot: Slot) -> None:
        """Give back a reserved call that will not be submitted."""
        ...

    def wait(self, ticket: int, deadline: float) -> Reply:
        """Wait for the answer to `ticket`, at most until `deadline` (of time.monotonic).

        Raises:
            RemoteError: the worker reported a failure.
            WorkerLost: the worker is gone, or the deadline passed.
            ProtocolError: the worker did not send a valid answer.
        """
        ...

    def cancel(self, ticket: int) -> None:
        """Forget a call; its late answer will be discarded."""
        ...

    def close(self) -> None:
        """End the session; safe to call twice."""
        ...


class Service(Protocol):
    """The work of a worker, independent of how messages are carried."""

    def welcome(self, hello: Hello) -> Welcome:
        """Describe this worker. The server checks the agreement and handles segments."""
        ...

    def open(self) -> "ServiceSession":
        """Open a session for the calls of one client; other clients cannot reach it."""
        ...


class Completion(Protocol):
    """Tells when a call is complete that a device still computes."""

    def is_done(self) -> bool:
        """Whether the outputs are written; does not wait.

        Raises:
            RuntimeError: the device failed.
        """
        ...

    def wait(self) -> None:
        """Wait until `is_done`, which may raise the same."""
        ...

    def compute_ns(self) -> int:
        """The time of this call on the device, once it is done."""
        ...


@runtime_checkable
class UsesMemory(Protocol):
    """A session that wants to know the memory that it shares with its client."""

    def use_memory(self, memory: Tensor) -> None:
        """Calls read and write this memory from now on: uint8, one dimension."""
        ...

    def forget_memory(self) -> None:
        """The memory will be unmapped. Returns when no call uses it any more."""
        ...


class ServiceSession(Protocol):
    """Handles the calls of one client, and keeps its state between calls."""

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        """Raise ProtocolError unless `operation` has inputs and outputs of these shapes."""
        ...

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Completion | None:
        """Compute `operation` and write the outputs in place.

        Returns:
            None if they are written, or what tells when they are. Until then, no tensor may be
            freed. The calls of a session are complete in their order.
        """
        ...

    def close(self) -> None:
        """Release all state; called once."""
        ...


def kind_of(operation: Operation) -> str:
    """The name under which statistics count an operation."""
    return operation.__struct_config__.tag  # type: ignore[return-value]


@dataclass(slots=True)
class InprocSlot:
    """A call in plain process memory; it is its own reply."""

    operation: Operation
    inputs: list[Tensor]
    outputs: list[Tensor]
    times: CallTimes | None = None
    error: RemoteError | None = None

    def __enter__(self) -> "InprocSlot":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.times is not None:
            self.times.end()


class InprocChannel:
    """A worker inside this process, computing at `submit`: for tests and benchmarks."""

    endpoint = "inproc"
    transport = "inproc"
    reason = "the worker runs inside this process"
    max_call_bytes = 2**62

    def __init__(self, service: Service, hello: Hello) -> None:
        self.counters = Counters()
        self.on_times: OnTimes | None = None
        self.welcome = service.welcome(hello)
        check_agreement(hello, self.welcome)
        self._session = service.open()
        self._calls: dict[int, InprocSlot] = {}
        self._tickets = 0
        self._closed = False

    def reserve(
        self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> InprocSlot:
        self._check_open()
        self._session.check(operation, inputs, outputs)
        return InprocSlot(
            operation,
            [torch.empty(spec.shape, dtype=spec.dtype) for spec in inputs],
            [torch.empty(spec.shape, dtype=spec.dtype) for spec in outputs],
            CallTimes(self.on_times, operation, inputs, outputs) if self.on_times else None,
        )

    def submit(self, slot: Slot) -> int:
        assert isinstance(slot, InprocSlot)
        kind, times = kind_of(slot.operation), slot.times
        end_stage(times, MASK)
        start = time.perf_counter_ns()
        try:
            completion = self._session.run(slot.operation, slot.inputs, slot.outputs)
            if completion is not None:
                completion.wait()
        except Exception as exc:
            message = str(exc) if isinstance(exc, TSQPError) else repr(exc)
            slot.error = RemoteError(
                f"The worker failed: {message}",
                traceback.format_exc(),
                out_of_memory=isinstance(exc, OutOfMemory),
            )
        compute_ns = time.perf_counter_ns() - start
        if times is not None:  # this thread does the worker's work: count it as waiting
            times.end_stage(WAIT)
            times.compute_ns = compute_ns
        self.counters.count_call(kind)
        self.counters.count_compute(kind, compute_ns / 1e9)
        self.counters.sent_bytes += sum(tensor.nbytes for tensor in slot.inputs)
        self.counters.received_bytes += sum(tensor.nbytes for tensor in slot.outputs)
        self._tickets += 1
        self._calls[self._tickets] = slot
        return self._tickets

    def discard(self, slot: Slot) -> None:
        pass

    def wait(self, ticket: int, deadline: float) -> InprocSlot:
        self._check_open()
        slot = self._calls.pop(ticket)
        if slot.error is not None:
            raise slot.error
        end_stage(slot.times, AWAY)
        return slot

    def cancel(self, ticket: int) -> None:
        self._calls.pop(ticket, None)

    def close(self) -> None:
        if not self._closed:
            self._session.close()
        self._closed = True
        self._calls.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerLost("The session with the worker inside this process has ended.")
