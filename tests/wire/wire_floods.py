"""Peers whose message never ends: ZMTP by hand, as no library would send it."""

import math
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from wire_helpers import welcome
from wire_peers import TCPServer

from tsqp.wire.codec import encode, worker_decoder
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.greeting import connect
from tsqp.wire.messages import Hello

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
PART = bytes(2**16)
PAUSE_S = 0.0003  # 200 MB/s at most: a busy machine may look late


def frame(body: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BQ", flags | LONG, len(body)) + body


LARGE = frame(PART, MORE)
EMPTY = bytes([MORE, 0]) * 1000  # as many frames


def ready(kind: bytes) -> bytes:
    name, length = b"Socket-Type", struct.pack(">I", len(kind))
    return frame(b"\x05READY" + bytes([len(name)]) + name + length + kind, COMMAND)


def read_exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def read_frame(peer: socket.socket) -> tuple[int, bytes]:
    flags = read_exactly(peer, 1)[0]
    size = (
        struct.unpack(">Q", read_exactly(peer, 8))[0] if flags & LONG else read_exactly(peer, 1)[0]
    )
    return flags, read_exactly(peer, size)


def shake_hands(peer: socket.socket, kind: bytes) -> None:
    """The handshake of ZMTP, not ours."""
    peer.sendall(GREETING)
    read_exactly(peer, len(GREETING))
    peer.sendall(ready(kind))
    flags, _ = read_frame(peer)
    assert flags & COMMAND


def flood(peer: socket.socket, most: float = math.inf, part: bytes = LARGE) -> None:
    """Send parts of one message until `most` bytes are sent or the other side hangs up.

    Args:
        part: one frame or several.
    """
    sent = 0
    try:
        while sent < most:
            peer.sendall(part)
            sent += len(part)
            time.sleep(PAUSE_S)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(2**16):
            pass
    except OSError:
        return


class FloodingWorker(TCPServer):
    """Floods at once or after its welcome, until it has sent `most` bytes."""

    def __init__(self, *, welcomes: bool, path: Path | None = None, most: float = math.inf) -> None:
        super().__init__(self._serve)
        self._welcomes = welcomes
        self._most = most
        if path is not None:
            self._listener.close()
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self._listener.settimeout(0.05)
            self.endpoint = parse_endpoint(f"ipc://{path}")

    def _serve(self, peer: socket.socket) -> None:
        peer.settimeout(None)
        shake_hands(peer, b"ROUTER")
        if self._welcomes:
            flags = COMMAND
            while flags & COMMAND:
                flags, body = read_frame(peer)
            _, message = worker_decoder().decode(body)
            assert isinstance(message, Hello)
            peer.sendall(frame(encode(welcome(message.nonce))))
        flood(peer, self._most)


def flood_worker(endpoint: str, part: bytes = LARGE) -> None:
    """Connect to a worker, and flood until it hangs up; run in a thread."""
    with connect(parse_endpoint(endpoint), time.monotonic() + 10) as peer:
        peer.settimeout(None)
        shake_hands(peer, b"DEALER")
        flood(peer, part=part)


@contextmanager
def memory_stays_below(growth: int) -> Iterator[None]:
    """At the end, this process has grown by less than so many bytes at any time since here."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = psutil.Process().memory_info().rss
    yield
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert peak - before < growth, f"{(peak - before) / 2**20:.0f} MiB"
