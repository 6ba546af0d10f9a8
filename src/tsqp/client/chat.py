"""Chats with an OpenAI-compatible server: its models, and its answers as they come.

How the server is reached is handed in as a transport, so whoever makes the transport decides which
servers get a prompt. Everything that a server sends is bounded before it is kept.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar

import httpx2
import msgspec

from tsqp.client.http_errors import ErrorDetails, refusal, reported, translated
from tsqp.client.server_url import CONNECT_S, ServerURL
from tsqp.errors import ServerError

T = TypeVar("T")

SILENCE_S = 600.0  # a server computes a long prompt before it sends anything
MAX_LIST = 4 * 2**20  # bytes of the list of models
MAX_ERROR = 2**16  # bytes of the body of an error
MAX_STREAM = 64 * 2**20  # bytes of a whole answer, with the JSON around it
MAX_EVENT = 2**20  # bytes of one of its events
MAX_NAME = 512  # characters of the name of a model
DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to an answer.

    Attributes:
        text: more of the answer. It comes from outside, with any characters.
        finish_reason: why the answer ended; None while it goes on.
        prompt_tokens, completion_tokens: of the whole answer, where the server counts them.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None
    index: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: ErrorDetails | None = None


class ChatServer:
    """A server, and how to ask it. Close it, or use it in a `with` block.

    Args:
        transport: reaches the server, see `open_transport`.
        api_key: what the server wants; empty for none.
        silence_s: maximum time in seconds in which a server may send nothing.
    """

    def __init__(
        self,
        url: ServerURL,
        transport: httpx2.BaseTransport,
        *,
        api_key: str = "",
        silence_s: float = SILENCE_S,
    ) -> None:
        for name in ("httpx2", "httpcore2"):  # they log every request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._url = url
        self._has_key = bool(api_key)
        headers = {"Accept-Encoding": "identity", "User-Agent": "tsqp"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx2.Client(
            transport=transport,
            headers=headers,
            timeout=httpx2.Timeout(silence_s, connect=CONNECT_S),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """The names of the models that the server has, at least one.

        Raises:
            ServerError: the server cannot be reached, refuses, or does not list its models.
        """
        with self._answer("GET", "/models", limit=MAX_LIST) as response:
            body = response.read()
        names = [model.id for model in self._decode(body, _Models).data]
        if not names or not all(_is_name(name) for name in names):
            raise ServerError(f"The server at {self._url} lists no model that can be asked for.")
        return names

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], fields: Mapping[str, object]
    ) -> Generator[Piece, None, None]:
        """The answer to a conversation, as it comes. Closing it ends the request.

        Args:
            fields: more fields of the request, such as `temperature`.

        Raises:
            PromptError: the server does not accept this conversation, or a field.
            ServerError: the server cannot be reached, refuses, or the answer is not complete.
        """
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        finished = False
        with self._answer("POST", "/chat/completions", body, limit=MAX_STREAM) as response:
            for data in self._events(response):
                if data == DONE:
                    break
                piece = self._piece(data)
                finished = finished or piece.finish_reason is not None
                yield piece
        if not finished:
            raise ServerError(f"The answer of {self._url} was cut off: try again.")

    @contextmanager
    def _answer(
        self, method: str, path: str, body: object = None, *, limit: int
    ) -> Iterator[httpx2.Response]:
        """An answer with status 200, whose body is not read yet.

        At the end of the block it is closed. If it was not read to its end, its connection is
        closed too, which tells the server to stop.

        Args:
            limit: maximum number of bytes of the body.
        """
        request = self._http.build_request(method, self._url.base + path, json=body)
        with translated(self._url):
            response = self._http.send(request, stream=True)
        with translated(self._url, within_body=True), closing(response):
            if response.headers.get("content-encoding", "identity") != "identity":
                raise ServerError(f"The server at {self._url} compresses, which was not asked for.")
            if response.status_code != 200:
                raise refusal(self._url, response, _beginning(response), has_key=self._has_key)
            assert isinstance(response.stream, httpx2.SyncByteStream)
            response.stream = _Bounded(response.stream, self._url, limit)
            yield response

    def _events(self, response: httpx2.Response) -> Iterator[str]:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            raise ServerError(
                f"The server at {self._url} does not stream its answers: check that it is "
                "OpenAI-compatible."
            )
        response.encoding = "utf-8"
        for event in httpx2.EventSource(response, max_event_size=MAX_EVENT):
            yield event.data

    def _piece(self, data: str) -> Piece:
        chunk = self._decode(data.encode("utf-8", "replace"), _Chunk)
        if chunk.error is not None:
            raise reported(self._url, chunk.error)
        if chunk.choices is None:
            raise self._not_openai()
        usage = chunk.usage or _Usage()
        text, reason = "", None
        for choice in chunk.choices:
            if choice.index == 0:
                text += (choice.delta.content or "") + (choice.delta.refusal or "")
                reason = choice.finish_reason or reason
        return Piece(text, reason, usage.prompt_tokens, usage.completion_tokens)

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            raise self._not_openai() from None  # the first error may quote what was sent

    def _not_openai(self) -> ServerError:
        return ServerError(
            f"The server at {self._url} does not answer as OpenAI's interface has it: check the "
            "address."
        )


class _Bounded(httpx2.SyncByteStream):
    """The body of an answer, which ends with an error where it is too large."""

    def __init__(self, stream: httpx2.SyncByteStream, url: ServerURL, limit: int) -> None:
        self._stream = stream
        self._url = url
        self._left = limit

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            self._left -= len(part)
            if self._left < 0:
                raise ServerError(f"The answer of {self._url} is too large: check what runs there.")
            yield part

    def close(self) -> None:
        self._stream.close()


def _beginning(response: httpx2.Response) -> bytes:
    """What an error says of itself, which comes first."""
    body = b""
    for part in response.iter_raw():
        body += part
        if len(body) > MAX_ERROR:
            break
    return body[:MAX_ERROR]


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable()
