"""The interface of a mailbox to a thread that waits for messages on a socket."""

import os
from typing import Protocol


class Wakeup(Protocol):
    """Tells whether there is mail in shared memory; see `tsqp.wire.mailbox`."""

    @property
    def has_mail(self) -> bool: ...

    def linger(self) -> bool:
        """Offer the core to others for some µs, or until there is mail; whether there is."""
        ...

    def say_asleep(self, asleep: bool) -> None: ...


class _NoWakeup:
    has_mail = False

    def linger(self) -> bool:
        os.sched_yield()
        return False

    def say_asleep(self, asleep: bool) -> None:
        pass


NO_WAKEUP: Wakeup = _NoWakeup()  # for a connection without shared memory
