"""The interface of a mailbox to a thread that waits for messages on a socket."""

from typing import Protocol


class Wakeup(Protocol):
    """Tells whether there is mail in shared memory; see `tsqp.wire.mailbox`."""

    @property
    def has_mail(self) -> bool: ...

    def say_asleep(self, asleep: bool) -> None: ...


class _NoWakeup:
    has_mail = False

    def say_asleep(self, asleep: bool) -> None:
        pass


NO_WAKEUP: Wakeup = _NoWakeup()  # for a connection without shared memory
