"""Bounds the bytes that a peer has sent and that were not yet received as whole messages.

libzmq collects all frames of a message before it returns the first one. It limits only the size of
a frame, so a peer whose message never ends would fill the memory. (It can also limit the number of
messages, but then a peer that passes this limit and hangs up ends the process: see `BaseSocket`.)
The kernel counts the bytes of each TCP connection, and the frames of received messages are
subtracted. A connection is shut down when too many bytes are left, and libzmq then frees what it
collected. Connections are checked every LOOK_MS.

The kernel does not count the bytes of Unix sockets: see `tsqp.wire.relay` and `tsqp.wire.peers`.
"""

import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from contextlib import suppress

LOOK_MS = 50  # how often connections are looked at
END_S = 10.0  # for a thread to end after its connection; it takes longer only if something is wrong
SLACK = 2**22  # allowed bytes of messages that were not asked for: failures and probes
CURVE_BYTES = 33  # added to each encrypted frame: name, nonce, authenticator, flags (RFC 26)
IDLE_BYTES_S = 256  # allowed for heartbeats; they take about 80 with CURVE, 16 without
_INFO_BYTES = 136  # bytes of struct tcp_info, up to the end of tcpi_bytes_received
_RECEIVED = struct.Struct("=Q")
_UNREAD = struct.Struct("=i")
_LINGER = struct.Struct("=ii")  # struct linger: whether, and seconds
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: process, user, group


class Inflow:
    """The bytes that one connection may still bring. One thread receives; another one looks.

    Args:
        limit: bytes that may have come and not been received as frames of messages.
        encrypted: whether the connection uses CURVE.

    Attributes:
        is_over: whether more than `limit` came.
    """

    def __init__(self, limit: int, *, encrypted: bool = False) -> None:
        self.is_over = False
        self._limit = limit
        self._frame_bytes = CURVE_BYTES if encrypted else 0
        self._received = 0
        self._heartbeats = 0.0  # bytes taken for these: no more than came, so none are saved up
        self._since = time.monotonic()

    def expect(self, count: int) -> None:
        """Raise the limit by `count` bytes. Lower it only after `received_frame`."""
        self._limit += count

    def received_frame(self, length: int) -> None:
        """The receiving thread calls this first after it received a frame of a message."""
        body = length + self._frame_bytes
        self._received += body + (2 if body < 256 else 9)  # flags and length: RFC 37

    def excess(self, count: int | None = None, connection: socket.socket | None = None) -> int:
        """How many bytes came beyond the limit; negative below it.

        Args:
            count: number of bytes that came so far; None to ask the kernel.
            connection: the connection to ask the kernel about.
        """
        if count is None:
            assert connection is not None
            count = received_bytes(connection)
        # In this order: a limit is lowered only after the frames for which it was raised were
        # counted, and all of these came before.
        limit = self._limit
        unread = count - self._received
        now = time.monotonic()
        most, self._since = self._heartbeats + IDLE_BYTES_S * (now - self._since), now
        self._heartbeats = max(self._heartbeats, min(most, unread))
        return unread - limit - int(self._heartbeats)


class Guard:
    """A thread that watches one TCP connection, and shuts it down when too much comes."""

    def __init__(self, descriptor: int, inflow: Inflow) -> None:
        """Watch the connection of libzmq with this `descriptor`."""
        self._connection = duplicate(descriptor)
        self._inflow = inflow
        self._thread = threading.Thread(target=self._watch, name="tsqp-guard", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        ends = select.poll()
        ends.register(self._connection, select.POLLRDHUP)
        with suppress(OSError):  # this system does not count
            while not ends.poll(LOOK_MS):
                self._look()

    def _look(self) -> None:
        if self._inflow.excess(connection=self._connection) > 0:
            self._inflow.is_over = True
            hang_up(self._connection)

    def close(self) -> None:
        """End the connection and the thread, and look a last time; safe to call twice.

        The thread may not have seen what came last: libzmq can read on after the peer has closed.
        """
        shut_down(self._connection)
        self._thread.join(END_S)
        with suppress(OSError):  # this system does not count, or this was closed before
            self._look()
        self._connection.close()


def duplicate(descriptor: int) -> socket.socket:
    """A duplicate of a socket of libzmq. Close it too, or the peer does not see the end.

    Raises:
        OSError: the connection has ended already.
    """
    number = os.dup(descriptor)
    try:
        return socket.socket(fileno=number)
    except BaseException:
        os.close(number)
        raise


def shut_down(connection: socket.socket) -> None:
    """End a connection for all who hold a descriptor of it."""
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def hang_up(connection: socket.socket) -> None:
    """End a TCP connection whose peer sends too much, by a reset once all descriptors are closed.

    Otherwise a peer that has filled its window learns of the end only after a minute: Linux
    announces no new window for a connection that was shut down.
    """
    with suppress(OSError):  # it has ended
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, 0))
    shut_down(connection)


def end_connection(descriptor: int) -> None:
    """End a connection of libzmq without duplicating its descriptor."""
    with suppress(OSError):  # it has ended
        connection = socket.socket(fileno=descriptor)
        try:
            shut_down(connection)
        finally:
            connection.detach()  # libzmq still owns the descriptor


def received_bytes(connection: socket.socket) -> int:
    """How many bytes libzmq has read from a TCP connection.

    Raises:
        OSError: this system does not count them, or the connection has ended.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        raise OSError("this system does not count the bytes of a connection")
    unread = fcntl.ioctl(connection, termios.FIONREAD, bytes(_UNREAD.size))
    (received,) = _RECEIVED.unpack_from(info, _INFO_BYTES - _RECEIVED.size)
    return int(received) - int(_UNREAD.unpack(unread)[0])


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return process, user


def is_trusted_user(connection: socket.socket) -> bool:
    """Whether the other end runs as the same user or as root, and so could kill this process."""
    return peer_of(connection)[1] in (0, os.geteuid())
