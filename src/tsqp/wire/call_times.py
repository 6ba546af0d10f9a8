"""The times of one call, measured by the TEE.

A call is divided into consecutive stages. Stages of different calls never overlap, because one
thread drives all calls. Times are measured only if there is a call log.
"""

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from tsqp.wire.messages import Operation
from tsqp.wire.tensors import Spec

STAGES = ("pads", "mask", "serialise", "send", "away", "wait", "receive", "unmask")
PADS, MASK, SERIALISE, SEND, AWAY, WAIT, RECEIVE, UNMASK = range(len(STAGES))

OnTimes = Callable[["CallTimes"], None]


class CallTimes:
    """The stopwatch of one call. It runs from its creation until `end`.

    Attributes:
        kind: kind of the operation.
        layer, group: layer and group of the operation, or None if it has none.
        rows: rows of the input, or of the answer if nothing is sent or the input is flat.
        sent_bytes, received_bytes: bytes of tensors.
        began_ns: start of the call, by time.perf_counter_ns.
        stages_ns: length of each stage, by the numbers above. "away" is other work of the TEE.
        compute_ns: compute time that the worker reported; it is not trusted.
    """

    __slots__ = (
        "_on_end",
        "_stage_ns",
        "began_ns",
        "compute_ns",
        "group",
        "kind",
        "layer",
        "received_bytes",
        "rows",
        "sent_bytes",
        "stages_ns",
    )

    def __init__(
        self, on_end: OnTimes, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> None:
        """Start the clock. Only names of the operation are kept, as operations may hold secrets."""
        self.began_ns = self._stage_ns = perf_counter_ns()
        self._on_end: OnTimes | None = on_end
        self.kind: str = operation.__struct_config__.tag  # type: ignore[assignment]
        self.layer: int | None = getattr(operation, "layer", None)
        self.group: str | None = getattr(operation, "group", None)
        shapes = [specs[0].shape for specs in (inputs, outputs) if specs]
        self.rows = next((shape[0] for shape in shapes if len(shape) > 1), 0)
        self.sent_bytes = sum(spec.nbytes for spec in inputs)
        self.received_bytes = sum(spec.nbytes for spec in outputs)
        self.stages_ns = [0] * len(STAGES)
        self.compute_ns = 0

    def end_stage(self, number: int) -> None:
        """Add the time since the end of the last stage to stage `number`."""
        now = perf_counter_ns()
        self.stages_ns[number] += now - self._stage_ns
        self._stage_ns = now

    def end(self) -> None:
        """Stop the clock after the answer has been read; safe to call twice."""
        if self._on_end is not None:
            self.end_stage(UNMASK)
            on_end, self._on_end = self._on_end, None
            on_end(self)


def end_stage(times: CallTimes | None, number: int) -> None:
    """`times.end_stage(number)`, unless `times` is None."""
    if times is not None:
        times.end_stage(number)
