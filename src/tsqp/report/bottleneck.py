"""Finds what a phase spends most of its time on, and how to reduce it."""

from dataclasses import dataclass

from tsqp.report.phases import TEE_PARTS, PhaseTimes
from tsqp.tee.call_lines import Header

GROUPS: dict[str, tuple[str, ...]] = {
    "worker compute": ("worker compute",),
    "link": ("send", "link", "receive"),
    "serialisation": ("serialise",),
    "TEE pads": ("pads",),
    "TEE masking": ("mask", "unmask"),
    "TEE own work": TEE_PARTS,
}


@dataclass(frozen=True, slots=True)
class Remedy:
    """Advice, with an estimate of the share of the bottleneck's time that it saves."""

    advice: str
    saves: float


REMEDIES = {
    "worker compute": Remedy(
        "Run the worker on a faster device, or give it more --threads; the estimate assumes half "
        "the time.",
        0.5,
    ),
    "serialisation": Remedy(
        "Make fewer and larger calls: run several prompts together; the estimate assumes twice as "
        "many.",
        0.5,
    ),
    "TEE pads": Remedy(
        "Make more pads ahead of time: raise --pad-memory, and leave pauses to make them.", 1.0
    ),
    "TEE masking": Remedy(
        "Give the TEE more cores and --threads; the estimate assumes twice as many.", 0.5
    ),
    "TEE own work": Remedy(
        "Give the TEE more cores and --threads; the estimate assumes twice as many.", 0.5
    ),
}
LINK_REMEDIES = {
    "inline": Remedy(
        "Put both sides on one machine with shared memory (transport poll), or use a faster "
        "network; if others use the worker, give this side a worker of its own; the estimate "
        "assumes half the time.",
        0.5,
    ),
    "": Remedy(
        "The time is spent per call, not per byte: run several prompts together, and give each "
        "side its own cores; if others use the worker, give this side a worker of its own; the "
        "estimate assumes half the time.",
        0.5,
    ),
}


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The group of parts that takes most of a phase.

    Attributes:
        seconds: wall time of the group.
        share: its share of the phase's wall time.
        faster: estimated speed-up of the phase with the remedy.
        at_most: speed-up if the group took no time at all.
    """

    phase: str
    name: str
    seconds: float
    share: float
    advice: str
    faster: float
    at_most: float
    arithmetic: str


def group_seconds(phase: PhaseTimes) -> dict[str, float]:
    """The phase's wall time, divided into GROUPS."""
    return {name: phase.seconds(*parts) for name, parts in GROUPS.items()}


def bottleneck(phase: PhaseTimes, header: Header) -> Bottleneck:
    """Find the bottleneck of one phase."""
    groups = group_seconds(phase)
    name = max(groups, key=groups.__getitem__)
    seconds, wall_s = groups[name], phase.wall_s
    remedy = REMEDIES.get(name) or LINK_REMEDIES["inline" if "inline" in header.transport else ""]
    saved_s = remedy.saves * seconds
    return Bottleneck(
        phase=phase.phase,
        name=name,
        seconds=seconds,
        share=seconds / wall_s,
        advice=remedy.advice,
        faster=_times(wall_s, wall_s - saved_s),
        at_most=_times(wall_s, wall_s - seconds),
        arithmetic=_arithmetic(groups, wall_s, seconds, saved_s),
    )


def show_times(times: float) -> str:
    """Format a speed-up."""
    return f"{times:.2f}" if times < 100 else "more than 100"


def _arithmetic(groups: dict[str, float], wall_s: float, seconds: float, saved_s: float) -> str:
    largest = sorted(groups.items(), key=lambda item: -item[1])
    terms = [f"{s:.3f} s {name} ({s / wall_s:.0%})" for name, s in largest if s >= 0.01 * wall_s]
    left_s = wall_s - saved_s
    some, most = _times(wall_s, left_s), _times(wall_s, wall_s - seconds)
    return (
        f"{wall_s:.3f} s = {' + '.join(terms)}; "
        f"{wall_s:.3f} − {saved_s:.3f} = {left_s:.3f} s: {show_times(some)} times as fast; "
        f"without all of it, {show_times(most)} times"
    )


def _times(before_s: float, after_s: float) -> float:
    return before_s / max(after_s, before_s * 1e-3)
