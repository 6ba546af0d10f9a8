"""A server of plain sockets that sends whatever it is told to, right or wrong."""

import json
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

MODELS = {"object": "list", "data": [{"id": "one"}, {"id": "two"}]}
DEADLINE_S = 60.0


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.body)
        return found


@dataclass
class PlainServer:
    """Answers each path with given bytes, then closes the connection.

    Attributes:
        replies: by path; bytes may come in parts, without end.
        asked: the requests so far.
        stays_open: wait for the client to close, instead of closing.
    """

    replies: dict[str, bytes | Iterable[bytes]] = field(default_factory=dict)
    stays_open: bool = False
    asked: list[Asked] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(DEADLINE_S)
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        first = stream.readline().decode("latin-1")
        headers = dict(_headers(stream))
        body = stream.read(int(headers.get("content-length", 0)))
        path = first.split(" ")[1] if " " in first else ""
        self.asked.append(Asked(path, headers, body))
        reply = self.replies.get(path, b"")
        try:
            for part in [reply] if isinstance(reply, bytes) else reply:
                connection.sendall(part)
            if self.stays_open and not stream.read(1):
                self.hung_up.set()
        except OSError:
            self.hung_up.set()


def _headers(stream: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    for line in stream:
        name, separator, value = line.decode("latin-1").strip().partition(":")
        if not separator:
            return
        yield name.lower(), value.strip()


def reply(
    body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = ""
) -> bytes:
    """A whole answer; `more` is further lines of its head."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def models() -> bytes:
    return reply(json.dumps(MODELS).encode())


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


def said(text: str, finish_reason: str | None = None) -> bytes:
    """An event with a piece of an answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def stream_of(*texts: str) -> bytes:
    """A whole stream."""
    return STREAM_HEAD + b"".join(map(said, texts)) + said("", "stop") + event("[DONE]")


def refused(message: str, status: str, more: str = "") -> bytes:
    """An error in OpenAI's form."""
    return reply(json.dumps({"error": {"message": message}}).encode(), status, more=more)
