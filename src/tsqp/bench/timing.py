"""Times a function on a machine whose speed varies."""

import statistics
from collections.abc import Callable
from time import perf_counter

SAMPLES = 7
SAMPLE_S = 0.02  # long compared with the clock and a call from Python


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one `run`: the median of SAMPLES of at least SAMPLE_S each, after a warm-up."""
    run()
    repeats = 1
    while (first := _total(run, repeats)) < SAMPLE_S:
        repeats = max(2 * repeats, int(repeats * SAMPLE_S / max(first, 1e-9)))
    return statistics.median(_total(run, repeats) for _ in range(SAMPLES)) / repeats


def least_seconds(run: Callable[[], object]) -> float:
    """Seconds of the fastest `run`, as an estimate of the machine's best speed."""
    return min(_total(run, 1) for _ in range(SAMPLES))


def _total(run: Callable[[], object], repeats: int) -> float:
    began = perf_counter()
    for _ in range(repeats):
        run()
    return perf_counter() - began
