"""Where the time of one call goes, as the TEE's side of a channel measures it.

A call's life is cut into laps, one after the other, each measured once: laps of all calls never
overlap, because one thread drives them. Nothing of this exists unless a log wants it.
"""

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from tsqp.wire.messages import Operation
from tsqp.wire.tensors import Spec

LAPS = ("pads", "mask", "serialise", "send", "away", "wait", "receive", "unmask")
PADS, MASK, SERIALISE, SEND, AWAY, WAIT, RECEIVE, UNMASK = range(len(LAPS))

OnTimes = Callable[["CallTimes"], None]


class CallTimes:
    """The stopwatch of one call; it runs from its making until `end`.

    Attributes:
        kind, layer, group: of the operation; None where it has none.
        rows: of its input; of its answer where nothing is sent, or the input is flat.
        sent_bytes, received_bytes: of tensors.
        began_ns: of time.perf_counter_ns.
        laps_ns: by the numbers above. "away" is time in which this side did something else.
        compute_ns: the worker's own word, which may be any number.
    """

    __slots__ = (
        "_lap_ns",
        "_on_end",
        "began_ns",
        "compute_ns",
        "group",
        "kind",
        "laps_ns",
        "layer",
        "received_bytes",
        "rows",
        "sent_bytes",
    )

    def __init__(
        self, on_end: OnTimes, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> None:
        """Begin. Of the operation, only what it is called is kept: some hold secrets."""
        self.began_ns = self._lap_ns = perf_counter_ns()
        self._on_end: OnTimes | None = on_end
        self.kind: str = operation.__struct_config__.tag  # type: ignore[assignment]
        self.layer: int | None = getattr(operation, "layer", None)
        self.group: str | None = getattr(operation, "group", None)
        shapes = [specs[0].shape for specs in (inputs, outputs) if specs]
        self.rows = next((shape[0] for shape in shapes if len(shape) > 1), 0)
        self.sent_bytes = sum(spec.nbytes for spec in inputs)
        self.received_bytes = sum(spec.nbytes for spec in outputs)
        self.laps_ns = [0] * len(LAPS)
        self.compute_ns = 0

    def lap(self, number: int) -> None:
        """Count the time since the last lap to this one."""
        now = perf_counter_ns()
        self.laps_ns[number] += now - self._lap_ns
        self._lap_ns = now

    def end(self) -> None:
        """The answer has been read; does nothing the second time."""
        if self._on_end is not None:
            self.lap(UNMASK)
            on_end, self._on_end = self._on_end, None
            on_end(self)


def lap(times: CallTimes | None, number: int) -> None:
    """`times.lap(number)`, where anybody wants times."""
    if times is not None:
        times.lap(number)
