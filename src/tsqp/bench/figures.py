"""Statistics of one quantity over several rounds, and ratios of modes taken within each round.

The speed of a machine drifts, so the ratio of two consecutive runs is more reliable than the ratio
of two medians.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RATIOS = (
    ("tee", "transformers"),
    ("transformers-worker", "tee"),
    ("open", "tee"),
    ("open", "transformers"),
    ("open-gpu-attention", "open"),
    ("open-fused", "open"),
    ("open-fused", "transformers-worker"),
    ("open-fused", "tee"),
    ("pad", "tee"),
    ("pad", "open"),
    ("pad", "transformers"),
    ("pad-inline", "tee"),
    ("shares", "tee"),
    ("pad", "transformers-worker"),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, minimum and maximum of one quantity over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))


def ratios(values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """The ratios "a/b" of RATIOS for which both modes were measured."""
    return {
        f"{a}/{b}": Figure.of([x / y for x, y in zip(values[a], values[b], strict=True)])
        for a, b in RATIOS
        if a in values and b in values
    }
