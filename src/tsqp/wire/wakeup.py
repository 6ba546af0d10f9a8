"""Where mail may come besides the socket."""

from typing import Protocol


class Wakeup(Protocol):
    """Of a connection with shared memory: see `tsqp.wire.mailbox`."""

    @property
    def has_mail(self) -> bool: ...

    def say_asleep(self, asleep: bool) -> None: ...


class _NoWakeup:
    has_mail = False

    def say_asleep(self, asleep: bool) -> None:
        pass


NO_WAKEUP: Wakeup = _NoWakeup()  # for a connection without shared memory
