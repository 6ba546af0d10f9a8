"""Where mail may come besides the socket."""

from typing import Protocol


class Doorbell(Protocol):
    """Of a connection with shared memory: see `tsqp.wire.mailbox`."""

    @property
    def has_mail(self) -> bool: ...

    def say_asleep(self, asleep: bool) -> None: ...


class _NoDoorbell:
    has_mail = False

    def say_asleep(self, asleep: bool) -> None:
        pass


NO_DOORBELL: Doorbell = _NoDoorbell()  # for a connection without shared memory
