"""Divides the time of each phase into parts that do not overlap and add up to the total."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal, get_args

from tsqp.report.read import LogFile
from tsqp.tee.call_lines import CallLine, PhaseSummary, Stage
from tsqp.tee.stats import KINDS, OPERATIONS

PhaseName = Literal["prefill", "decode"]
PHASES: tuple[PhaseName, ...] = ("prefill", "decode")

LEAST_S = 1e-6  # the resolution of the clocks; dividing by less may overflow

CALL_PARTS = (
    "pads",
    "mask",
    "serialise",
    "send",
    "link",
    "worker compute",
    "receive",
    "unmask",
)
TEE_PARTS = (*KINDS, "joining rows", "other")  # work of the TEE between calls


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """The times of one phase of one run.

    Attributes:
        wall_s: wall time of its steps, or only of its calls if the log has no last line.
        parts_s: times by CALL_PARTS and by the TEE_PARTS that were measured; their sum is
            `wall_s`.
        bytes_sent, bytes_received: bytes of tensors.
    """

    phase: PhaseName
    wall_s: float
    steps: int
    tokens: int
    calls: int
    bytes_sent: int
    bytes_received: int
    parts_s: dict[str, float]

    def seconds(self, *parts: str) -> float:
        """The total time of some parts."""
        return sum(self.parts_s.get(part, 0.0) for part in parts)

    @property
    def tee_s(self) -> float:
        """The time of the TEE's own work between calls."""
        return self.seconds(*TEE_PARTS)


def phases_of(log: LogFile) -> list[PhaseTimes]:
    """All phases that took at least LEAST_S."""
    found = (_phase(log, phase) for phase in PHASES)
    return [each for each in found if each.wall_s >= LEAST_S]


def call_parts_us(call: CallLine) -> tuple[float, ...]:
    """The TEE's time for one call, by CALL_PARTS, in microseconds.

    The worker reports its own compute time, which is cut to the time of the wait.
    """
    compute = min(call.compute_us, call.wait_us)
    return (
        call.pads_us,
        call.mask_us,
        call.serialise_us,
        call.send_us,
        call.wait_us - compute,
        compute,
        call.receive_us,
        call.unmask_us,
    )


def _phase(log: LogFile, phase: PhaseName) -> PhaseTimes:
    calls = [call for call in log.calls if call.phase == phase]
    summary = None
    if log.summary is not None:
        summary = log.summary.prefill if phase == "prefill" else log.summary.decode
    sent, received = sum(c.sent_bytes for c in calls), sum(c.received_bytes for c in calls)
    if summary is None:
        columns = zip(*map(call_parts_us, calls), strict=True) if calls else ()
        parts_s = {n: sum(c) / 1e6 for n, c in zip(CALL_PARTS, columns, strict=False)}
        wall_s, steps = sum(parts_s.values()), len({call.step for call in calls})
        return PhaseTimes(phase, wall_s, steps, 0, len(calls), sent, received, parts_s)
    parts_s = _of_calls(summary)
    methods = {call.method for call in calls}
    parts_s |= _between(summary, methods, sum(parts_s.values()))
    # An inconsistent log may have parts that are longer than the total.
    wall_s = max(summary.wall_s, sum(parts_s.values()))
    return PhaseTimes(
        phase, wall_s, summary.steps, summary.tokens, summary.calls, sent, received, parts_s
    )


def _of_calls(summary: PhaseSummary) -> dict[str, float]:
    """Sums over all calls, including those whose lines are missing."""
    stages_s = {stage: summary.stages_s.get(stage, 0.0) for stage in get_args(Stage)}
    wait_s = stages_s.pop("wait")
    compute_s = min(stages_s.pop("compute"), wait_s)
    waits_s = {"worker compute": compute_s, "link": wait_s - compute_s}
    return {name: (stages_s | waits_s)[name] for name in CALL_PARTS}


def _between(summary: PhaseSummary, methods: Set[str], calls_s: float) -> dict[str, float]:
    """The times of the work between calls.

    The kinds of work that workers do are measured with their calls included. The rest of that
    time is spent splitting inputs into blocks of rows and joining the answers.
    """
    away = {kind for kind, names in OPERATIONS.items() if methods & set(names)}
    own_s = {kind: summary.kinds_s.get(kind, 0.0) for kind in KINDS if kind not in away}
    away_s = sum(summary.kinds_s.get(kind, 0.0) for kind in away)
    own_s["joining rows"] = max(0.0, away_s - calls_s) if away else 0.0
    other_s = summary.wall_s - sum(own_s.values()) - calls_s
    return own_s | {"other": max(0.0, other_s)}
