"""Pads are made ahead by a background thread, or when they are needed if the stock is empty.

Lattice masks [P11] are pads here. `PadPool.take` is the only way to a pad, and it removes what it
returns; there is no way to put one back. Shape suffixes: N rows; D input and F output features of a
group.
"""

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter, process_time, sleep

from tsqp.errors import TSQPError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.cpu_clock import ThreadClock
from tsqp.tee.crypto.pad_providers import PadProvider
from tsqp.tee.crypto.pads import Pads, row_bytes_in_stock
from tsqp.tee.crypto.stock import Stock

log = logging.getLogger("tsqp")

POLL_S = 0.001
DISCARDED_ROWS = 64  # at once
RETRY_S = 1.0  # after pads could not be made
NICE = 10  # of the background thread, if the system knows no idle policy


@dataclass(slots=True)
class PadStats:
    """How many pads were made ahead, and how many while the engine waited.

    Attributes:
        ahead_rows: rows taken from the stock.
        inline_rows: rows made while the engine waited for them. This took `inline_s` seconds, and
            `inline_cpu_s` of processor time.
        background_cpu_s: processor time of the thread that makes pads ahead, and its helpers;
            0 if the system does not tell.
        stock_bytes: bytes of the pads that are ready.
        made_rows: rows made for all groups, ahead or not, used or not.
    """

    ahead_rows: int = 0
    inline_rows: int = 0
    inline_s: float = 0.0
    inline_cpu_s: float = 0.0
    background_cpu_s: float = 0.0
    stock_bytes: int = 0
    made_rows: int = 0


class PadPool:
    """A bounded stock of pads, refilled by a background thread while the engine waits.

    It has no locks: an asynchronous exception could leave a lock held, and `close` would wait for
    ever. Every step that two threads must not both take is a single atomic operation of the
    interpreter, on a deque or a SimpleQueue.

    Args:
        shapes: (F, D) of each group.
        memory_bytes: memory for the stock. Every group gets the same number of rows. If this is
            less than one batch of the provider takes, the stock has room for the rest of a batch
            that was made when needed, and no pads are made ahead.
    """

    def __init__(
        self,
        provider: PadProvider,
        shapes: Mapping[LinearGroup, tuple[int, int]],
        memory_bytes: int,
    ) -> None:
        self._stats = PadStats()
        self._made: dict[int, int] = {}  # rows, by thread: each is written by that one only
        self._clock = ThreadClock()
        self._provider = provider
        self._shapes = dict(shapes)
        self._row_bytes = {
            key: row_bytes_in_stock(provider.field, *shape) for key, shape in shapes.items()
        }
        self._rows = memory_bytes // sum(self._row_bytes.values())
        self._batches = {key: provider.batch_rows(key, self._rows, self._rows) for key in shapes}
        # Replaced as a whole by an empty one at the end, and never changed: others iterate over it.
        numbers = list(range(provider.stock_rows(self._rows)))
        self._stocks = {
            key: Stock(numbers, *shape, provider.field) for key, shape in shapes.items()
        }
        self._wake: SimpleQueue[None] = SimpleQueue()  # something to look at for the thread
        self._in_making: deque[int] = deque()  # batches that have their places in a stock
        self._closed = False
        self._is_held = False
        self._pid = os.getpid()
        _pools.add(self)
        self._thread = threading.Thread(target=self._refill, name="tsqp-pads", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> PadStats:
        """How the pads came about, until now."""
        return replace(
            self._stats,
            background_cpu_s=self._clock.seconds(),
            stock_bytes=self.nbytes,
            made_rows=sum(list(self._made.values())),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the pads that are ready."""
        stocks = self._stocks
        return sum(self._row_bytes[key] * stock.ready for key, stock in stocks.items())

    def take(self, key: LinearGroup, rows: int) -> Pads:
        """Remove and return pads. Pads that are not in stock are made first.

        Raises:
            TSQPError: the pool is closed, or this is a forked process, whose parent has the same
                pads.
        """
        taken = self._remove(key, rows)
        ahead = 0 if taken is None else len(taken)
        self._stats.ahead_rows += ahead
        if taken is not None and ahead == rows:
            return taken
        began, cpu_began = perf_counter(), self.other_cpu_s()
        parts = [] if taken is None else [taken]
        parts += self._make_in_line(key, rows - ahead)
        self._stats.inline_rows += rows - ahead
        self._stats.inline_s += perf_counter() - began
        self._stats.inline_cpu_s += max(0.0, self.other_cpu_s() - cpu_began)
        return Pads.joined(parts)

    def _make_in_line(self, key: LinearGroup, rows: int) -> Iterator[Pads]:
        """Exactly this many rows; any others that are made go into the stock."""
        while rows > 0:
            made = self._provider.rows_made(key, rows)
            stock = self._stocks.get(key)
            part: Pads | None
            if made > rows and stock is not None and stock.fill(made, partial(self._make, key)):
                part = self._remove(key, rows)
            else:
                features, width = self._shapes[key]
                pads = part = Pads.empty(made, width, features, self._provider.field)
                self._make(key, pads, list(range(made)))
                if made > rows:
                    part = pads.copy(slice(rows))
                    pads.wipe()
            if part is not None:  # else another thread took all of them
                rows -= len(part)
                yield part

    def other_cpu_s(self) -> float:
        """Processor time of this process, without the time to make pads ahead.

        It may go back a little: the two clocks are not read at once, and a helper of the thread
        counts from when it is found.
        """
        return process_time() - self._clock.seconds()

    def hold(self) -> None:
        """Let the background thread make no more pads, so that it does not disturb a measurement.

        `fill` still makes them, and so does `take` if the stock is empty.
        """
        self._is_held = True

    def fill(self) -> None:
        """Wait until the stock is full."""
        while not self._closed:
            if (batch := self._next(whole=False)) is not None:
                self._make_ahead(*batch)
            elif self._in_making:  # by the background thread
                sleep(POLL_S)
            else:
                break

    def discard(self) -> None:
        """Remove the pads in stock unused."""
        for stock in self._stocks.values():
            while (taken := stock.take(DISCARDED_ROWS)) is not None:
                taken.wipe()
        self._wake.put(None)

    def close(self) -> None:
        """Forget all pads and stop making any; safe to call twice, and from any thread."""
        self._closed = True
        stocks, self._stocks = self._stocks, {}
        self._wake.put(None)
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()
        for stock in stocks.values():
            stock.end()
        self._provider.forget()

    def _remove(self, key: LinearGroup, rows: int) -> Pads | None:
        if self._pid != os.getpid():
            raise TSQPError("A forked process cannot use its parent's pads; make its own LLM.")
        stock = self._stocks.get(key)
        if stock is None:
            raise TSQPError("The pads of this session are gone; begin a new one.")
        taken = stock.take(rows)
        # Waking the thread takes longer than taking a row, so only if it has something to do.
        if self._room(key, stock, whole=True) and not self._is_held and self._wake.empty():
            self._wake.put(None)
        return taken

    def _next(self, *, whole: bool) -> tuple[LinearGroup, int] | None:
        """The group with the smallest stock that has room, and the number of rows to make.

        Args:
            whole: consider only groups with room for a whole batch.
        """
        stocks = self._stocks
        rooms = {key: self._room(key, stock, whole=whole) for key, stock in stocks.items()}
        with_room = (key for key, rows in rooms.items() if rows)
        key = min(with_room, key=lambda key: stocks[key].ready, default=None)
        return None if key is None else (key, rooms[key])

    def _room(self, key: LinearGroup, stock: Stock, *, whole: bool) -> int:
        """Rows of the next batch; 0 if there is too little room for one."""
        room, batch = min(stock.room, self._rows), self._batches[key]
        if room >= batch:
            return batch
        return 0 if whole else self._provider.batch_rows(key, room, self._rows)

    def _make_ahead(self, key: LinearGroup, rows: int) -> None:
        stock = self._stocks.get(key)
        if stock is not None:
            try:
                self._in_making.append(rows)
                stock.fill(rows, partial(self._make, key))
            finally:
                with suppress(IndexError):  # the exception may have come first
                    self._in_making.pop()

    def _make(self, key: LinearGroup, pads: Pads, place: list[int]) -> None:
        self._provider.make(key, pads, place)
        thread = threading.get_ident()
        self._made[thread] = self._made.get(thread, 0) + len(place)

    def _refill(self) -> None:
        _give_way()
        self._clock.mark()
        failed = False
        while not self._closed:
            batch = None if self._is_held else self._next(whole=True)
            if batch is None:
                self._wake.get()
                continue
            try:
                self._make_ahead(*batch)
                failed = False
            except Exception as exc:  # memory is short, for one: it may not be for ever
                if not failed:
                    log.warning("cannot make pads ahead (%s); going on trying", type(exc).__name__)
                failed = True
                self._pause()
            self._clock.look()

    def _pause(self) -> None:
        """Wait before the next attempt, or until the pool is closed."""
        end = monotonic() + RETRY_S
        with suppress(Empty):
            while not self._closed:
                self._wake.get(timeout=max(0.0, end - monotonic()))


def _give_way() -> None:
    """Give the calling thread, and the threads that it starts, the lowest scheduling priority."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    with suppress(OSError):  # some systems, Gramine for one, have no such policy
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


_pools: weakref.WeakSet[PadPool] = weakref.WeakSet()


def _forget_in_child() -> None:
    """Drop the pads in a forked child: using the copy of a pad would use it twice."""
    for pool in list(_pools):
        pool._stocks = {}


def _close_all() -> None:
    """Close all pools at exit: a thread that makes pads while Python ends would abort it."""
    for pool in list(_pools):
        pool.close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)
