"""How an `AsyncLLM` ends: when it is closed, when nobody holds it, and when Python ends."""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack

from tsqp.runtime.engine_thread import EngineThread
from tsqp.runtime.fair_pool import FairPool


class Ends:
    """What has to be closed at the end, the last one first."""

    def __init__(self, thread: EngineThread, *pools: FairPool) -> None:
        self._thread = thread
        self._pools = pools
        self._closers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.closed = False
        _all.add(self)

    def add(self, closer: Callable[[], None]) -> None:
        """Have a function called at the end, before those that were added earlier."""
        self._closers.append(closer)

    def close(self) -> None:
        """See `AsyncLLM.close`."""
        if self._pid != os.getpid():
            return
        self.closed = True
        if self._thread.is_current:  # the last reference was dropped within a step
            threading.Thread(target=self.close, name="tsqp-close").start()
            return
        with self._lock:
            self._thread.close(self._close_rest)

    def _close_rest(self) -> None:
        with ExitStack() as stack:
            for closer in self._closers:
                stack.callback(closer)
            for pool in self._pools:  # each waiting prompt is refused, and none is tokenized
                stack.callback(pool.shutdown)


_all: weakref.WeakSet[Ends] = weakref.WeakSet()


def _close_all() -> None:
    """A thread that computes while Python ends would abort the process."""
    with ExitStack() as stack:
        for ends in list(_all):
            stack.callback(ends.close)


atexit.register(_close_all)
