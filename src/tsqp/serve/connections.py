"""Connections of clients that are slow, or too many."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Any, NoReturn
from weakref import WeakSet

from uvicorn.protocols.http.h11_impl import H11Protocol

from tsqp.serve.options import ServeOptions

# Small, so that what a client does not read is noticed, and not kept in the kernel.
SEND_BUFFER = 64 * 2**10
LEAST_PROGRESS = 16 * 2**10  # bytes that a slow reader takes in `send_timeout`
AT_ONCE = struct.pack("ii", 1, 0)  # on, after 0 seconds
REFUSED_AT_ONCE = 100  # then the event loop has its turn
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class Listener(socket.socket):
    """A listening socket that closes what is beyond a number of connections.

    It counts them before TLS, so that handshakes count, too.
    """

    def __init__(self, listening: socket.socket, most: int, refusal: bytes = REFUSAL) -> None:
        """Take the place of `listening`.

        Args:
            most: maximum number of connections.
            refusal: what the others are sent; empty with TLS.
        """
        super().__init__(fileno=listening.detach())
        self._most = most
        self._refusal = refusal
        self._open: WeakSet[socket.socket] = WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection for which there is room."""
        for _ in range(REFUSED_AT_ONCE):
            link, address = super().accept()
            if sum(each.fileno() >= 0 for each in self._open) < self._most:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                self._open.add(link)
                return link, address
            link.setblocking(False)
            with link, suppress(OSError):
                link.send(self._refusal)
        raise BlockingIOError

    def dup(self) -> NoReturn:
        raise NotImplementedError("the copy would not count")


class Connection(H11Protocol):
    """A connection whose client has to send its headers, and to take its answers, in time."""

    def __init__(self, options: ServeOptions, **given: Any) -> None:
        super().__init__(**given)
        self._header_timeout = options.header_timeout
        self._send_timeout = options.send_timeout
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Anything unsent pauses the writing, and starts the timer. TLS takes 0 for "always".
        transport.set_write_buffer_limits(high=1 if self.scheme == "https" else 0, low=0)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_header_timer()
        elif self._header_timer is None and (before is None or before.response_complete):
            self._await_header()  # of the next request, or the rest of a body that nobody wants

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(self._header_timeout, self.transport.abort)

    def _await_progress(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self._send_timeout, self._look)

    def _look(self) -> None:
        if self._unsent - self.transport.get_write_buffer_size() < LEAST_PROGRESS:
            link = self.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)  # drop the rest of it
            self.transport.abort()
        else:
            self._await_progress()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
