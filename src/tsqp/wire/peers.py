"""The connections of a worker: none, and not all together, may fill its memory."""

import errno
import socket
from contextlib import suppress

from tsqp.checkpoint.memory import available_bytes
from tsqp.wire.inflow import Inflow, duplicate, end_connection, is_trusted_user, shut_down

MAX_INFLOW = 2**30  # bytes of one connection that are not received as messages yet


class Peers:
    """What each connection has brought, see `tsqp.wire.inflow`.

    One thread says what happens to connections and looks at them. Another one receives.
    """

    def __init__(self) -> None:
        self._connections: dict[int, socket.socket] = {}  # by libzmq's descriptor
        self._inflows: dict[int, Inflow] = {}
        self._most = max(MAX_INFLOW, available_bytes() // 2)  # of all connections together

    def __len__(self) -> int:
        return len(self._inflows)

    def received_message(self, descriptor: int) -> None:
        """A whole message was received from a connection."""
        inflow = self._inflows.get(descriptor)
        if inflow is not None:
            inflow.received_message()

    def meet(self, descriptor: int) -> None:
        """A connection begins. Over a Unix socket, it is ended if another user made it.

        The kernel counts no bytes there; but whoever is let in could end this process anyway. A
        connection for which there is no descriptor left is ended too.
        """
        self.part(descriptor)  # an earlier one, whose end was not reported yet
        try:
            connection = duplicate(descriptor)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):  # it could not be watched
                end_connection(descriptor)
            return  # else it has ended
        if connection.family == socket.AF_UNIX:
            if not is_trusted_user(connection):
                shut_down(connection)
            connection.close()
            return
        self._connections[descriptor] = connection
        self._inflows[descriptor] = Inflow(0)

    def part(self, descriptor: int) -> None:
        """A connection has ended."""
        self._inflows.pop(descriptor, None)
        if (connection := self._connections.pop(descriptor, None)) is not None:
            connection.close()

    def look(self) -> None:
        """End the connections that bring too much, those that brought most first."""
        unread = {}
        for descriptor, connection in self._connections.items():
            with suppress(OSError):  # it has ended, or this system does not count
                unread[descriptor] = self._inflows[descriptor].excess(connection=connection)
        for descriptor in sorted(unread, key=unread.__getitem__, reverse=True):
            if unread[descriptor] <= MAX_INFLOW and sum(unread.values()) <= self._most:
                return
            shut_down(self._connections[descriptor])
            self.part(descriptor)
            del unread[descriptor]

    def close(self) -> None:
        """Let go of all connections."""
        for descriptor in list(self._connections):
            self.part(descriptor)
