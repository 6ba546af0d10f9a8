"""The pads of one group that were made ahead, in memory that is allocated once.

Shape suffixes: D input and F output features of a group.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from tsqp.algebra.params import WIDE, Field
from tsqp.tee.crypto.pads import Pads, compile_stock


class Stock:
    """The pads of one group that are in stock, in arrays that are allocated once.

    Separate arrays for every batch would be simpler, but the allocator would keep freed memory: the
    process grew to twice the budget. So pads are made directly in these arrays.

    The number of a row is in `_ready`, in `_empty`, or with the thread that popped it. A pop is one
    atomic step of the interpreter, so two threads never get the same row. An exception at any
    moment (Ctrl-C) leaves a row ready or gone; a lock could stay held. Such an exception loses only
    the room of the rows that were popped at that moment.
    """

    def __init__(
        self, numbers: Sequence[int], features: int, width: int, field: Field = WIDE
    ) -> None:
        """Make room for rows, whose numbers from 0 all stocks of a pool may share."""
        compile_stock()
        self._pads = Pads.empty(len(numbers), width, features, field)
        self._empty = deque(numbers)
        self._ready: deque[int] = deque()
        self._is_over = False

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def room(self) -> int:
        return len(self._empty)

    def fill(self, rows: int, make: Callable[[Pads, list[int]], None]) -> bool:
        """Add rows, if there is room for all of them; whether there was.

        Args:
            make: writes fresh pads to these places of these arrays.
        """
        numbers = _pop(self._empty, rows)
        if len(numbers) < rows:
            self._empty.extend(numbers)
            return False
        try:
            make(self._pads, numbers)
        except Exception:
            self._pads.wipe(_place(numbers))
            self._empty.extend(numbers)
            raise
        self._ready.extend(numbers)  # last: from here on they may be taken
        if self._is_over:  # since it was begun
            self.end()
        return True

    def take(self, rows: int) -> Pads | None:
        """Remove the oldest rows, at most this many; None if there are none."""
        numbers = _pop(self._ready, rows)
        if not numbers:
            return None
        pads = self._pads.taken(numbers)
        self._empty.extend(numbers)
        return pads

    def end(self) -> None:
        """Wipe all rows that were not taken, for good; safe to call twice."""
        self._is_over = True
        if numbers := _pop(self._ready, len(self._ready)):
            self._pads.wipe(_place(numbers))


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
