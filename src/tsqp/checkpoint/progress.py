"""How loading tells how far it is: in bytes of weights."""

from collections.abc import Callable
from time import perf_counter

Progress = Callable[[int, int], None]  # the bytes done, and their total


def silent(done: int, total: int) -> None:
    """Tell nobody."""


class Counter:
    """Adds up what is done, and tells it each time, nothing at first."""

    def __init__(self, total: int, progress: Progress = silent) -> None:
        self._done = 0
        self._total = total
        self._progress = progress
        self.add(0)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)


class Rate:
    """Passes progress on, and knows how long it took from the first call to the last."""

    def __init__(self, progress: Progress = silent) -> None:
        self._progress = progress
        self._done = 0
        self._began: float | None = None
        self._seconds = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = perf_counter()
        self._began = now if self._began is None else self._began
        self._done, self._seconds = done, now - self._began
        self._progress(done, total)

    def describe(self, layers: int) -> str:
        """One line for people: what was loaded, and how fast."""
        mebibytes = self._done / 2**20
        return (
            f"loaded {layers} layers, {mebibytes:,.0f} MiB in {self._seconds:.1f} s "
            f"({mebibytes / max(self._seconds, 1e-9):,.0f} MiB/s)"
        )


def part_of(progress: Progress, before: int, total: int) -> Progress:
    """What one of several steps calls: `before` bytes come from the steps before it."""
    return lambda done, _: progress(before + done, total)
