"""A TCP relay between a client and a server, which keeps what the client sends."""

import socket
import threading
from contextlib import suppress
from typing import Self


class RecordingRelay:
    """Listens on a port of this machine, and passes every connection on.

    Attributes:
        target: the port to which new connections lead. It may be changed.
        received: all that clients sent.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.received = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        for each in self._sockets:
            each.close()

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target), 30)
                server.settimeout(None)
                self._sockets += [client, server]
                self._start(self._pass_on, client, server, True)
                self._start(self._pass_on, server, client, False)

    def _pass_on(self, source: socket.socket, to: socket.socket, is_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_client:
                    self.received += data
                to.sendall(data)
        with suppress(OSError):
            to.shutdown(socket.SHUT_WR)
