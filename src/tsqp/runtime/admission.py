"""How many sequences may wait, and whose."""

import threading
from collections import Counter
from typing import Protocol, Self

from tsqp.errors import QueueFull


class Queue(Protocol):
    """What holds the sequences that were let in, such as an `Engine`."""

    @property
    def num_running(self) -> int:
        """Number of running sequences."""

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences."""

    def num_waiting_of(self, tenant: str) -> int:
        """Number of waiting sequences of one tenant."""


class Place:
    """Room for some sequences of one tenant, from when they are let in until they are queued.

    As a context manager, it gives back at its end what nobody has taken.
    """

    def __init__(self, admission: "Admission", tenant: str, count: int) -> None:
        self._admission = admission
        self._tenant = tenant
        self._count = count

    def part(self, count: int) -> "Place":
        """Take room for so many sequences out of it."""
        assert 0 <= count <= self._count
        self._count -= count
        return Place(self._admission, self._tenant, count)

    def give_back(self) -> None:
        """Free what is left of it; safe to call twice."""
        count, self._count = self._count, 0
        self._admission.leave(self._tenant, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class Admission:
    """Counts the sequences that wait, from before their prompts are tokenized.

    Args:
        max_running: maximum number of sequences that run at the same time.
        max_waiting: maximum number of sequences that wait; None for no limit.
        is_shared: whether there are several tenants. One of them may then have at most half of the
            places that the others leave, and always one, so that there are places left for others.
        queue: which holds the sequences after that; None if nothing does.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int | None,
        *,
        is_shared: bool = False,
        queue: Queue | None = None,
    ) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._is_shared = is_shared
        self.queue = queue
        self._lock = threading.Lock()
        self._arriving: Counter[str] = Counter()

    @property
    def num_arriving(self) -> int:
        """Number of sequences that were let in, and that the queue does not have yet."""
        return self._arriving.total()

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait, here or in the queue."""
        return self.num_arriving + (0 if self.queue is None else self.queue.num_waiting)

    def let_in(self, count: int, tenant: str) -> Place:
        """A place for so many sequences of a tenant.

        Raises:
            QueueFull: there is no room for them.
        """
        with self._lock:
            self._check(count, tenant)
            self._arriving[tenant] += count
        return Place(self, tenant, count)

    def leave(self, tenant: str, count: int) -> None:
        """Count sequences no more. See `Place.give_back`."""
        with self._lock:
            self._arriving[tenant] -= count
            if not self._arriving[tenant]:
                del self._arriving[tenant]

    def _check(self, count: int, tenant: str) -> None:
        limit, queue = self._max_waiting, self.queue
        if limit is None:
            return
        running = 0 if queue is None else queue.num_running
        free, waiting = max(0, self._max_running - running), self.num_waiting
        if waiting + count > limit + free:
            raise QueueFull("Too many requests are waiting; try again later.")
        own = self._arriving[tenant] + (0 if queue is None else queue.num_waiting_of(tenant))
        if self._is_shared and own + count > free + share(limit - (waiting - own)):
            raise QueueFull("Too many of your own requests are waiting; try again later.")


def share(places: int) -> int:
    """How many of the places that others leave one tenant may have."""
    return max(1, places // 2)
