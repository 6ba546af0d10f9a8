"""Bounds the memory of a worker's connections: of each one, and of all together."""

import errno
import socket
from contextlib import suppress

from tsqp.checkpoint.memory import available_bytes
from tsqp.wire.inflow import (
    SLACK,
    Inflow,
    duplicate,
    end_connection,
    hang_up,
    is_trusted_user,
    shut_down,
)

MAX_INFLOW = 2**30  # bytes of one connection that were not yet received as messages


class Peers:
    """The inflow of each connection, see `tsqp.wire.inflow`.

    One thread calls `add`, `remove` and `look`. Another thread receives messages.

    Args:
        encrypted: whether the connections use CURVE.
    """

    def __init__(self, *, encrypted: bool = False) -> None:
        self._encrypted = encrypted
        self._connections: dict[int, socket.socket] = {}  # by descriptor of libzmq
        self._inflows: dict[int, Inflow] = {}
        self.measure()

    def measure(self) -> None:
        """Set the limits for all connections together, from the memory that is free now.

        libzmq takes far more memory for a message of small frames than there are bytes on the wire,
        so the memory that is left counts, too.
        """
        free = available_bytes()
        self._most, self._reserve = max(MAX_INFLOW, free // 2), free // 4

    def __len__(self) -> int:
        return len(self._inflows)

    def inflow(self, descriptor: int) -> Inflow | None:
        """The inflow of a connection, if it is watched."""
        return self._inflows.get(descriptor)

    def add(self, descriptor: int) -> None:
        """Watch a new connection. A Unix connection of another user is ended.

        The kernel does not count the bytes of other Unix connections, but their users could end
        this process anyway. A connection is also ended if no file descriptor is left to watch it.
        """
        self.remove(descriptor)  # an earlier connection whose end was not reported yet
        try:
            connection = duplicate(descriptor)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):  # it could not be watched
                end_connection(descriptor)
            return  # otherwise it has already ended
        if connection.family == socket.AF_UNIX:
            if not is_trusted_user(connection):
                shut_down(connection)
            connection.close()
            return
        self._connections[descriptor] = connection
        self._inflows[descriptor] = Inflow(0, encrypted=self._encrypted)

    def remove(self, descriptor: int) -> None:
        """Stop watching a connection that has ended."""
        self._inflows.pop(descriptor, None)
        if (connection := self._connections.pop(descriptor, None)) is not None:
            connection.close()

    def look(self) -> None:
        """End connections that brought too much, beginning with those that brought most.

        If little memory is left, the one that brought most is ended in any case, unless it is
        little.
        """
        unread = {}
        for descriptor, connection in self._connections.items():
            with suppress(OSError):  # it has ended, or this system does not count
                unread[descriptor] = self._inflows[descriptor].excess(connection=connection)
        is_short = max(unread.values(), default=0) > SLACK and available_bytes() < self._reserve
        for descriptor in sorted(unread, key=unread.__getitem__, reverse=True):
            is_much = unread[descriptor] > MAX_INFLOW or sum(unread.values()) > self._most
            if not is_much and not is_short:
                return
            is_short = False  # what was taken for this one is free again a little later
            hang_up(self._connections[descriptor])
            self.remove(descriptor)
            del unread[descriptor]

    def close(self) -> None:
        """Stop watching all connections, without ending them."""
        for descriptor in list(self._connections):
            self.remove(descriptor)
