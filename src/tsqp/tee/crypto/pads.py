"""Pads: uniform residues r with their products u = Wq · r, each used for one row and never again.

`take` is the only way to a pad, and it removes what it returns; there is no way to put one back.
Shape suffixes: N rows; D input and F output features of a group.
"""

import logging
import os
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import Field
from tsqp.algebra.residue_bytes import Int32
from tsqp.errors import TSQPError
from tsqp.model.config import Key
from tsqp.tee.cpu_clock import ThreadClock
from tsqp.tee.crypto.rng import uniform

log = logging.getLogger("tsqp")

BATCH_ROWS = 64  # made at once: enough for the matrix units
BATCH_PRODUCTS = 2**29  # and at most this many, so that the engine never waits long for a core
BATCHES = 4  # at least, of a small stock: it is refilled before it is used up
RETRY_S = 1.0  # after pads could not be made
NICE = 10  # of the background thread, where the system knows no idle policy


@dataclass(frozen=True, slots=True)
class Pads:
    """Rows of one group.

    Attributes:
        r_ND: uniform on [0, p).
        u_NF: Wq · r mod p.
    """

    r_ND: Int32
    u_NF: Int32

    def __len__(self) -> int:
        return len(self.r_ND)

    @property
    def nbytes(self) -> int:
        return int(self.r_ND.nbytes + self.u_NF.nbytes)


class PadProvider(Protocol):
    """Makes batches of pads."""

    def make(self, key: Key, rows: int) -> Pads:
        """Fresh pads for one group, never given out before."""
        ...


class DirectProvider:
    """[P4]: the TEE multiplies its own random rows."""

    def __init__(self, weights_FD: Mapping[Key, Tensor], field: Field) -> None:
        self._weights_FD = weights_FD
        self._field = field

    def make(self, key: Key, rows: int) -> Pads:
        weight_FD = self._weights_FD[key]
        features, width = weight_FD.shape
        r_ND = uniform((rows, width), self._field)
        u_NF = np.empty((rows, features), np.int32)
        residue_product(torch.from_numpy(r_ND), weight_FD, self._field, torch.from_numpy(u_NF))
        return Pads(r_ND, u_NF)


@dataclass(slots=True)
class PadStats:
    """How the pads came about.

    Attributes:
        ahead_rows: taken from the stock.
        inline_rows: made while the engine waited for them, which took `inline_s`, and
            `inline_cpu_s` of processor time.
        background_cpu_s: processor time of the thread that makes pads ahead, and its helpers;
            0 where the system does not tell.
        stock_bytes: of the pads that lie ready.
    """

    ahead_rows: int = 0
    inline_rows: int = 0
    inline_s: float = 0.0
    inline_cpu_s: float = 0.0
    background_cpu_s: float = 0.0
    stock_bytes: int = 0


class _Stock:
    """The pads of one group that lie ready: a ring of rows, whose memory is taken once.

    Arrays of their own for every batch would be cheaper by a copy, but the allocator would keep
    what they leave: the process grew to twice the budget.
    """

    def __init__(self, rows: int, features: int, width: int) -> None:
        self.ready = 0
        self._rows = rows
        self._first = 0
        self._r_ND = np.empty((rows, width), np.int32)
        self._u_NF = np.empty((rows, features), np.int32)

    @property
    def room(self) -> int:
        return self._rows - self.ready

    def put(self, pads: Pads) -> None:
        """Add rows, for which there is room."""
        assert len(pads) <= self.room
        done = 0
        for place in self._places(self._first + self.ready, len(pads)):
            part = slice(done, done + place.stop - place.start)
            self._r_ND[place], self._u_NF[place] = pads.r_ND[part], pads.u_NF[part]
            done = part.stop
        self.ready += len(pads)

    def take(self, rows: int) -> list[Pads]:
        """Remove the oldest rows, at most so many."""
        rows = min(rows, self.ready)
        places = self._places(self._first, rows)
        taken = [Pads(self._r_ND[place].copy(), self._u_NF[place].copy()) for place in places]
        self._first = (self._first + rows) % max(self._rows, 1)
        self.ready -= rows
        return taken

    def _places(self, begin: int, rows: int) -> list[slice]:
        """Where so many rows from `begin` lie: in one piece, or in two around the end."""
        begin %= max(self._rows, 1)
        whole = slice(begin, min(begin + rows, self._rows))
        around = slice(0, begin + rows - whole.stop)
        return [place for place in (whole, around) if place.start < place.stop]


class PadPool:
    """A bounded stock of pads, refilled by a thread of its own while the engine waits.

    Args:
        shapes: (F, D) of each group.
        memory_bytes: what the stock may take. Every group gets as many rows.
    """

    def __init__(
        self, provider: PadProvider, shapes: Mapping[Key, tuple[int, int]], memory_bytes: int
    ) -> None:
        self._stats = PadStats()
        self._clock = ThreadClock()
        self._provider = provider
        self._shapes = dict(shapes)
        row_bytes = 4 * sum(features + width for features, width in shapes.values())
        self._rows = memory_bytes // row_bytes
        self._stocks = {key: _Stock(self._rows, *shape) for key, shape in shapes.items()}
        self._lock = threading.Condition()
        self._closed = False
        self._pid = os.getpid()
        _pools.add(self)
        self._thread = threading.Thread(target=self._refill, name="tsqp-pads", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> PadStats:
        """How the pads came about, until now."""
        background_cpu_s = self._clock.seconds()
        return replace(self._stats, background_cpu_s=background_cpu_s, stock_bytes=self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the pads that lie ready."""
        with self._lock:
            stocks = self._stocks.items()
            return sum(4 * stock.ready * sum(self._shapes[key]) for key, stock in stocks)

    def take(self, key: Key, rows: int) -> Pads:
        """Remove and return pads; makes what is not in stock.

        Raises:
            TSQPError: this is a forked process, whose parent has the same pads.
        """
        taken = self._remove(key, rows)
        ahead = sum(map(len, taken))
        self._stats.ahead_rows += ahead
        if ahead < rows:
            began, cpu_began = perf_counter(), self.other_cpu_s()
            taken.append(self._provider.make(key, rows - ahead))
            self._stats.inline_rows += rows - ahead
            self._stats.inline_s += perf_counter() - began
            self._stats.inline_cpu_s += self.other_cpu_s() - cpu_began
        if len(taken) == 1:
            return taken[0]
        r_ND = np.concatenate([pads.r_ND for pads in taken])
        return Pads(r_ND, np.concatenate([pads.u_NF for pads in taken]))

    def other_cpu_s(self) -> float:
        """Processor time of this process without that of making pads ahead."""
        return process_time() - self._clock.seconds()

    def fill(self) -> None:
        """Wait until the stock is full."""
        while (batch := self._next(wait=False)) is not None:
            self._make(*batch)

    def close(self) -> None:
        """Forget all pads and stop making any; safe to call twice."""
        with self._lock:
            self._closed = True
            self._stocks.clear()
            self._lock.notify_all()
        if self._pid == os.getpid():
            self._thread.join()

    def _remove(self, key: Key, rows: int) -> list[Pads]:
        if self._pid != os.getpid():
            raise TSQPError("A forked process cannot use its parent's pads; make its own LLM.")
        with self._lock:
            if self._closed:
                raise TSQPError("The pads of this session are gone; begin a new one.")
            taken = self._stocks[key].take(rows)
            self._lock.notify_all()
            return taken

    def _next(self, *, wait: bool) -> tuple[Key, int] | None:
        """The group with the least stock that has room, and how many rows to make.

        Args:
            wait: for room for a whole batch; else a part of one will do, and None says that
                everything is full.
        """
        with self._lock:
            while not self._closed:
                rooms = {key: self._room(key, whole=wait) for key in self._stocks}
                with_room = (key for key, rows in rooms.items() if rows)
                key = min(with_room, key=lambda key: self._stocks[key].ready, default=None)
                if key is not None:
                    return key, rooms[key]
                if not wait:
                    return None
                self._lock.wait()
        return None

    def _room(self, key: Key, *, whole: bool) -> int:
        """Rows of the next batch; 0 if there is no room."""
        features, width = self._shapes[key]
        a_few = -(-self._rows // BATCHES)
        batch = max(1, min(BATCH_ROWS, a_few, BATCH_PRODUCTS // (features * width)))
        room = self._stocks[key].room
        return batch if room >= batch else 0 if whole else room

    def _make(self, key: Key, rows: int) -> None:
        pads = self._provider.make(key, rows)
        with self._lock:
            # Two may have made a batch for the same room; what does not fit was never used.
            if not self._closed and rows <= self._stocks[key].room:
                self._stocks[key].put(pads)

    def _refill(self) -> None:
        _give_way()
        self._clock.mark()
        failed = False
        while (batch := self._next(wait=True)) is not None:
            try:
                self._make(*batch)
                failed = False
            except Exception as exc:  # memory is short, for one: it may not be for ever
                if not failed:
                    log.warning("cannot make pads ahead (%s); going on trying", type(exc).__name__)
                failed = True
                with self._lock:
                    self._lock.wait_for(lambda: self._closed, RETRY_S)
            self._clock.look()


def _give_way() -> None:
    """Let the calling thread, and those that it starts, run where nobody else wants to."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    with suppress(OSError):  # some systems, Gramine for one, have no such policy
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


_pools: weakref.WeakSet[PadPool] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A child has a copy of the parent's pads; using one would be using it twice."""
    for pool in list(_pools):
        pool._lock = threading.Condition()  # another thread may have held it in the parent
        pool._stocks.clear()


os.register_at_fork(after_in_child=_forget_in_child)
