"""Processor time of one thread and of the OpenMP threads that compute for it.

A difference of such times, or of one and the process's own, is of clocks that are read one after
another, and may be negative. `MonotonicClock` corrects that.

OpenMP starts separate helper threads for each thread that uses it. On Linux a new thread inherits
the name of the thread that starts it, so a unique name marks all of them.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_TASKS = Path("/proc/self/task")
_THREAD_CPU_CLOCK = 6  # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED in Linux


class MonotonicClock:
    """The largest reading of a clock so far, in seconds. Used by one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = 0.0

    def __call__(self) -> float:
        self._seconds = max(self._seconds, self._clock())
        return self._seconds


class ThreadClock:
    """Adds up the time of a thread and its helpers; stays at 0 if the system does not report it."""

    def __init__(self) -> None:
        self._name = ""
        self._known: dict[int, bool] = {}  # whether a thread is one of ours
        self._ours: tuple[int, ...] = ()

    def mark(self) -> None:
        """Mark the calling thread. Call this before it has helpers."""
        thread = threading.get_native_id()
        self._name = f"tsqp-{thread}"[:15]
        try:
            (_TASKS / str(thread) / "comm").write_text(self._name)
        except OSError:
            return
        self.look()

    def look(self) -> None:
        """Find helpers that have been started since the last look."""
        try:
            threads = [int(name) for name in os.listdir(_TASKS)]  # noqa: PTH208, five times faster
        except OSError:
            return
        self._known = {t: self._known.get(t) or self._is_ours(t) for t in threads}
        self._ours = tuple(thread for thread, is_ours in self._known.items() if is_ours)

    def seconds(self) -> float:
        """Seconds so far, of the threads that have been found."""
        return sum(map(_cpu_seconds, self._ours))

    def _is_ours(self, thread: int) -> bool:
        try:
            return (_TASKS / str(thread) / "comm").read_text().strip() == self._name
        except OSError:  # it has ended
            return False


def _cpu_seconds(thread: int) -> float:
    try:
        return time.clock_gettime((~thread << 3) | _THREAD_CPU_CLOCK)
    except OSError:  # it has ended
        return 0.0
