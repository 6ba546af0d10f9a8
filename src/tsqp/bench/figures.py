"""One quantity over several rounds, and ratios that are taken within each round.

Machines drift: a ratio of two runs that follow one another says more than one of two medians.
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
    """Median, least and most of one quantity over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))


def ratios(values: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Those of RATIOS whose modes were both measured, as "a/b"."""
    return {
        f"{a}/{b}": Figure.of([x / y for x, y in zip(values[a], values[b], strict=True)])
        for a, b in RATIOS
        if a in values and b in values
    }
