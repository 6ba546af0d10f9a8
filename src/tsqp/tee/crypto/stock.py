"""The pads of one group that were made ahead, in memory that is allocated once.

Shape suffixes: D input and F output features of a group.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from tsqp.algebra.params import WIDE, Field
from tsqp.tee.crypto.pads import Pads, empty_rows, used_mark, wipe


class Stock:
    """The pads of one group that are in stock, in arrays that are allocated once.

    Separate arrays for every batch would save a copy, but the allocator would keep freed memory:
    the process grew to twice the budget.

    The number of a row is in `_ready`, in `_empty`, or with the thread that popped it. A pop is one
    atomic step of the interpreter, so two threads never get the same row. An exception at any
    moment (Ctrl-C) leaves a row ready or gone, where a lock could stay held. Such an exception only
    loses the room of the rows that were popped at that moment.
    """

    def __init__(
        self, numbers: Sequence[int], features: int, width: int, field: Field = WIDE
    ) -> None:
        """Make room for rows, whose numbers from 0 all stocks of a pool may share."""
        self._r_ND = empty_rows(len(numbers), width, field)
        self._u_NF = empty_rows(len(numbers), features, field)
        self._empty = deque(numbers)
        self._ready: deque[int] = deque()

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def room(self) -> int:
        return len(self._empty)

    def put(self, pads: Pads) -> None:
        """Add as many rows as there is room for. The others are dropped unused."""
        numbers = _pop(self._empty, len(pads))
        if numbers:
            place = _place(numbers)
            some = pads[: len(numbers)]
            self._r_ND[place], self._u_NF[place] = some.r_ND, some.u_NF
            self._ready.extend(numbers)  # last: from here on they may be taken

    def take(self, rows: int) -> Pads | None:
        """Remove the oldest rows, at most this many; None if there are none."""
        numbers = _pop(self._ready, rows)
        if not numbers:
            return None
        place = _place(numbers)
        pads = Pads(self._r_ND[place].copy(), self._u_NF[place].copy())
        if (pads.r_ND[:, -1] == used_mark(pads.r_ND)).any():  # the highest bits of a residue
            raise AssertionError("A pad was about to be given out twice.")
        # Whoever reads this memory later should not find what an earlier call was masked with. It
        # costs half a copy; and a row that came twice after all would be noticed above.
        wipe(Pads(self._r_ND, self._u_NF), place)
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
