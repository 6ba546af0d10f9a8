"""Pads: uniform residues r with their products u = Wq · r, each used for one row and never again.

Shape suffixes: N rows; D input and F output features of a group.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from tsqp.algebra.residue_bytes import Int32

USED = -1  # no residue: what lies in the place of a row that was given out


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


class Stock:
    """The pads of one group that lie ready, in arrays whose memory is taken once.

    Arrays of their own for every batch would be cheaper by a copy, but the allocator would keep
    what they leave: the process grew to twice the budget.

    The number of a row is in `_ready`, in `_empty`, or with whoever popped it from there. A pop is
    one step of the interpreter, so two threads never get the same row, and an exception that comes
    at any moment (Ctrl-C) leaves a row ready or gone. A lock could be left held by it. What such
    an exception costs is the room of the rows that were in the air.
    """

    def __init__(self, numbers: Sequence[int], features: int, width: int) -> None:
        """Make room for rows, whose numbers from 0 all stocks of a pool may share."""
        self._r_ND = np.empty((len(numbers), width), np.int32)
        self._u_NF = np.empty((len(numbers), features), np.int32)
        self._empty = deque(numbers)
        self._ready: deque[int] = deque()

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def room(self) -> int:
        return len(self._empty)

    def put(self, pads: Pads) -> None:
        """Add rows, as many as there is room for; the others are dropped, and were never used."""
        numbers = _pop(self._empty, len(pads))
        if numbers:
            place = _place(numbers)
            self._r_ND[place], self._u_NF[place] = (
                pads.r_ND[: len(numbers)],
                pads.u_NF[: len(numbers)],
            )
            self._ready.extend(numbers)  # last: from here on they may be taken

    def take(self, rows: int) -> Pads | None:
        """Remove the oldest rows, at most so many; None where there are none."""
        numbers = _pop(self._ready, rows)
        if not numbers:
            return None
        place = _place(numbers)
        pads = Pads(self._r_ND[place].copy(), self._u_NF[place].copy())
        if (pads.r_ND[:, 0] < 0).any():
            raise AssertionError("A pad was about to be given out twice.")
        # Whoever reads this memory later should not find what an earlier call was masked with. It
        # costs half a copy; and a row that came twice after all would be noticed above.
        self._r_ND[place] = self._u_NF[place] = USED
        self._empty.extend(numbers)
        return pads


def _pop(numbers: deque[int], most: int) -> list[int]:
    """Remove and return the first numbers; each belongs to this caller from its pop on."""
    popped: list[int] = []
    with suppress(IndexError):
        while len(popped) < most:
            popped.append(numbers.popleft())
    return popped


def _place(numbers: list[int]) -> list[int] | slice:
    """Where these rows lie; as a slice, which copies faster, where they follow one another."""
    stop = numbers[0] + len(numbers)
    return slice(numbers[0], stop) if numbers == list(range(numbers[0], stop)) else numbers
