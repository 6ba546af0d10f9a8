"""Progress of loading, in bytes of weights."""

from collections.abc import Callable
from time import perf_counter

Progress = Callable[[int, int], None]  # the bytes done, and their total


def silent(done: int, total: int) -> None:
    """A progress function that does nothing."""


class Counter:
    """Adds up the bytes done, and reports the sum each time, beginning with 0."""

    def __init__(self, total: int, progress: Progress = silent) -> None:
        self._done = 0
        self._total = total
        self._progress = progress
        self.add(0)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)


class Rate:
    """Passes progress on, and measures the time from the first call to the last."""

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
        """A line of text: what was loaded, and how fast."""
        mebibytes = self._done / 2**20
        return (
            f"loaded {layers} layers, {mebibytes:,.0f} MiB in {self._seconds:.1f} s "
            f"({mebibytes / max(self._seconds, 1e-9):,.0f} MiB/s)"
        )


def part_of(progress: Progress, before: int, total: int) -> Progress:
    """The progress function of one of several steps; earlier steps have done `before` bytes."""
    return lambda done, _: progress(before + done, total)
