"""How loading tells how far it is: in bytes of weights."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # the bytes done, and their total


def silent(done: int, total: int) -> None:
    """Tell nobody."""


class Counter:
    """Adds up what is done, and tells it each time."""

    def __init__(self, total: int, progress: Progress = silent) -> None:
        self.done = 0
        self._total = total
        self._progress = progress

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self._progress(self.done, self._total)


def part_of(progress: Progress, before: int, total: int) -> Progress:
    """What one of several steps calls: `before` bytes come from the steps before it."""
    return lambda done, _: progress(before + done, total)


def describe(layers: int, nbytes: int, seconds: float) -> str:
    """One line for people: what was loaded, and how fast."""
    mebibytes = nbytes / 2**20
    return (
        f"loaded {layers} layers, {mebibytes:,.0f} MiB in {seconds:.1f} s "
        f"({mebibytes / max(seconds, 1e-9):,.0f} MiB/s)"
    )
