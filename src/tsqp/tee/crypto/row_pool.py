"""A few threads that divide the rows of one call among them."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from queue import Empty, SimpleQueue

from tsqp.tee.crypto.kernels import ALL_ROWS

MIN_ROWS = 16  # below, a second thread costs more than it saves
LOOK_S = 0.05  # how soon a wake-up that an interrupt swallowed is made good

Kernel = Callable[[int, int], int]


@dataclass(slots=True)
class _Call:
    """The state that the threads of one call share.

    A helper adds a part to `started`, then reads `is_off`. A thread that cancels the call sets
    `is_off`, then reads `started`. So every part that runs is waited for.

    Attributes:
        found: the result of each finished part: a row at fault, ALL_ROWS, or the exception that the
            kernel raised.
        wake: signals a new entry in `found`.
    """

    kernel: Kernel
    started: list[int] = field(default_factory=list)
    found: list[int | BaseException] = field(default_factory=list)
    wake: SimpleQueue[None] = field(default_factory=SimpleQueue)
    is_off: bool = False

    def do(self, first: int, stop: int) -> None:
        """Compute one part."""
        self.started.append(first)
        try:
            self.found.append(ALL_ROWS if self.is_off else self.kernel(first, stop))
        except BaseException as exc:
            self.found.append(exc)
        self.wake.put(None)

    def call_off(self) -> None:
        """Start no more parts, and wait for those that run."""
        self.is_off = True
        self.wait(lambda: len(self.started))

    def wait(self, parts: Callable[[], int]) -> None:
        """Wait until this many parts are done. An interrupt is raised only after that."""
        interrupt: BaseException | None = None
        while len(self.found) < parts():
            try:
                with suppress(Empty):
                    self.wake.get(timeout=LOOK_S)
            except BaseException as exc:
                interrupt = exc
        if interrupt is not None:
            raise interrupt


class RowPool:
    """Runs parts of a call in its own threads, and one part in the calling thread.

    The threads share no lock that an interrupt could leave held. A ThreadPoolExecutor does, and
    its shutdown would then wait for ever.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._tasks: SimpleQueue[tuple[_Call, int, int] | None] = SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._closed = False

    def run(self, rows: int, kernel: Kernel) -> int:
        """Call `kernel(first, stop)` on parts of the rows; returns the row at fault, or ALL_ROWS.

        When this returns or raises, no kernel runs any more, because kernels write to the caller's
        memory.
        """
        parts = min(self._threads, rows // MIN_ROWS)
        if parts <= 1 or self._closed:  # a token at a time: the rest would take longer
            return kernel(0, rows)
        while len(self._helpers) < self._threads - 1:
            helper = threading.Thread(target=self._serve, name="tsqp-rows", daemon=True)
            helper.start()
            self._helpers.append(helper)
        edges = [rows * part // parts for part in range(parts + 1)]
        call = _Call(kernel)
        try:
            for first, stop in pairwise(edges[1:]):
                self._tasks.put((call, first, stop))
            mine = kernel(0, edges[1])
            call.wait(lambda: parts - 1)
        except BaseException:
            call.call_off()
            raise
        for each in call.found:
            if isinstance(each, BaseException):
                raise each
        found = [mine, *(each for each in call.found if isinstance(each, int))]
        return min((row for row in found if row != ALL_ROWS), default=ALL_ROWS)

    def close(self) -> None:
        """End the threads; safe to call twice, and from any thread. `run` needs none of them."""
        self._closed = True
        for _ in range(self._threads):
            self._tasks.put(None)
        for helper in self._helpers:
            if helper is not threading.current_thread():
                helper.join()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            call, first, stop = task
            call.do(first, stop)
            del call, task  # and with them the caller's arrays
