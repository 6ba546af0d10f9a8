"""Who may use an LLM: one call at a time, in the process that made it, until it is closed."""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TypeVar

from tsqp.errors import UsageError

LOOK_S = 0.05  # how soon a thread that waits notices what nobody woke it for
END_S = 60.0  # for the step of another thread, before `end` gives up

T = TypeVar("T")


class _Turn:
    """One call, from its arrival to its end."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.wake: SimpleQueue[None] = SimpleQueue()


class Turns:
    """Runs calls from several threads one after the other, and closes after the last of them.

    There is no lock, because an interrupt could leave it held. Calls are the keys of a dictionary,
    and the first key has its turn. Adding a key, and removing one, is a single step of the
    interpreter. Objects that are still open when Python ends are closed then.
    """

    def __init__(self) -> None:
        self._queue: dict[_Turn, None] = {}  # in order of arrival; the first one runs
        self._closers: list[Callable[[], None]] = []
        self._ending = False
        self._pid = os.getpid()
        _all.add(self)

    def at_end(self, closer: Callable[[], None]) -> None:
        """Have `closer` called at the end, before those that were added earlier.

        It may be called more than once, by any thread, if an interrupt stopped it.
        """
        self._closers.append(closer)

    def check(self) -> None:
        """Raise unless calls may go on; a call asks from time to time.

        Raises:
            UsageError: the LLM is closed, or this process is a fork of the one that made it.
        """
        if self._is_forked:
            raise UsageError(
                "This LLM belongs to the process that this one was forked from, and so do its "
                "worker and its pads; make a new LLM in this process."
            )
        if self._ending:
            raise UsageError("This LLM is closed; make a new one.")

    def heed(self, should_stop: Callable[[], bool] | None) -> Callable[[], bool]:
        """The function that a call asks before each step: `should_stop`, and then `check`.

        The callbacks of the step before may have closed the LLM, or forked.
        """

        def stop() -> bool:
            is_over = should_stop is not None and should_stop()
            self.check()
            return is_over

        return stop

    def run(self, call: Callable[[], T]) -> T:
        """Call `call` when those that came before have ended.

        Raises:
            UsageError: see `check`; or this thread is inside a call already.
        """
        self.check()
        if self._is_inside:
            raise UsageError(
                "This LLM was called from its own callback (on_text, on_progress or should_stop), "
                "and is still busy; call it after the callback has returned, or use a second LLM."
            )
        turn, began = _Turn(), False
        try:
            try:
                self._queue[turn] = None
                self._wait_for(turn)
                began = True
                return call()
            finally:
                self._queue.pop(turn, None)
        finally:
            self._queue.pop(turn, None)  # again: an interrupt may have come before the first one
            self._wake_next()
            if began and self._ending:  # `end` was called meanwhile, maybe by a callback
                self.end()

    def end(self) -> None:
        """Let no call begin or go on, and then close everything; safe to call twice.

        A call that runs in another thread ends at its next step, with a UsageError there. From a
        callback this returns at once, and everything is closed when the call has ended. In a forked
        process it does nothing, as everything belongs to the parent.

        Raises:
            UsageError: a call of another thread does not end.
        """
        self._ending = True
        if self._is_forked or self._is_inside:
            return
        turn = _Turn()
        try:
            try:
                self._queue[turn] = None
                self._wait_for(turn, END_S)
                self._close()
            finally:
                self._queue.pop(turn, None)
        finally:
            self._queue.pop(turn, None)
            self._wake_next()

    @property
    def _is_forked(self) -> bool:
        return self._pid != os.getpid()

    @property
    def _order(self) -> list[_Turn]:
        """A copy, made in one step: other threads change the queue meanwhile."""
        return list(self._queue)

    @property
    def _is_inside(self) -> bool:
        me = threading.get_ident()
        return any(turn.thread == me for turn in self._order)

    def _wait_for(self, turn: _Turn, limit_s: float | None = None) -> None:
        """Wait for a turn: while calls are let in, or, with `limit_s`, whatever they do."""
        deadline = None if limit_s is None else monotonic() + limit_s
        while self._order[0] is not turn:
            with suppress(Empty):
                turn.wake.get(timeout=LOOK_S)
            if deadline is None:
                self.check()
            elif monotonic() > deadline:
                raise UsageError(
                    f"This LLM was still in use by another thread after {END_S:.0f} seconds; end "
                    "that call before closing."
                )

    def _wake_next(self) -> None:
        for turn in self._order[:1]:
            turn.wake.put(None)

    def _close(self) -> None:
        """Call every closer, whatever the others raise."""
        with ExitStack() as stack:
            for closer in self._closers:
                stack.callback(closer)


_all: weakref.WeakSet[Turns] = weakref.WeakSet()


def _end_all() -> None:
    """A thread that computes while Python ends would abort the process."""
    with ExitStack() as stack:
        for turns in list(_all):
            stack.callback(turns.end)


atexit.register(_end_all)
