"""The answers of `tsqp chat --url`: of a server."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from types import FrameType

from tsqp.cli.console import for_terminal, say
from tsqp.client.chat import ChatServer, Piece
from tsqp.client.server_url import open_transport, parse_server_url
from tsqp.errors import UsageError
from tsqp.serve.options import read_api_keys
from tsqp.tee.sampling import SamplingParams

# Sent only where they differ from this, because not every server knows them.
_NEUTRAL = {
    "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "seed": None, "stop_token_ids": (),
}  # fmt: skip


def open_server(url: str, api_key: str, cacert: Path | None) -> ChatServer:
    """The server at an address, and a warning if others could read along.

    Raises:
        UsageError: the address or `cacert` cannot be used.
    """
    address = parse_server_url(url)
    transport = open_transport(address, cacert)
    if address.is_exposed:
        key = ", the API key" if api_key else ""
        say(
            f"Prompts{key} and answers travel to {address} in clear: use https, or a tunnel to "
            "this machine."
        )
    return ChatServer(address, transport, api_key=api_key)


def choose_model(server: ChatServer, wanted: str | None) -> str:
    """The model to ask: the server's first one, unless another is wanted.

    Raises:
        ServerError: see `ChatServer.models`.
    """
    names = server.models()
    if wanted is not None and wanted not in names:
        say(f"The server does not list this model. It lists {', '.join(names[:20])}.")
    return names[0] if wanted is None else wanted


def read_api_key(given: str | None, file: Path | None) -> str:
    """The key to send; empty for none. Of several in a variable or a file, the first one.

    A file is preferred, because it was named for this chat.

    Raises:
        UsageError: the file cannot be read, or the key cannot be sent.
    """
    if given is not None and not given.strip():
        raise UsageError("The API key is empty: set TSQP_API_KEY to a key, or unset it.")
    keys = (given or "").split() if file is None else read_api_keys((), file)
    key = keys[0] if keys else ""
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            "An API key must be printable ASCII characters; the key itself is not shown."
        )
    return key


def request_fields(params: SamplingParams, *, split_special: bool) -> dict[str, object]:
    """The fields of a request, with the names that vLLM and this server have."""
    given: dict[str, object] = {
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    for name, neutral in _NEUTRAL.items():
        if (value := getattr(params, name)) not in (neutral, None):
            given[name] = value
    if params.logit_bias:
        given["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.stop_strings:
        given["stop"] = list(params.stop_strings)
    return given | ({"split_special": True} if split_special else {})


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """An answer as it ended."""

    text: str
    finish_reason: str


@dataclass
class _Statistics:
    """Of one answer, or of all so far. Times are in seconds, from the request on."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_s: float = 0.0  # until the first text
    all_s: float = 0.0


class RemoteModel:
    """A model of a server; see `tsqp.cli.repl.Answerer`."""

    def __init__(self, server: ChatServer, model: str, *, split_special: bool) -> None:
        self._server = server
        self._model = model
        self._split_special = split_special
        self._statistics = _Statistics()

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        params: SamplingParams,
        should_stop: Callable[[], bool],
    ) -> RemoteAnswer:
        """Print an answer as it comes. Stopping it closes the connection.

        Raises:
            PromptError, ServerError: see `ChatServer.stream`.
        """
        given = request_fields(params, split_special=self._split_special)
        texts: list[str] = []
        reason = "stop"
        counts = _Statistics(answers=1)
        began = perf_counter()
        with closing(self._server.stream(self._model, messages, given)) as stream:
            try:
                while (piece := _next(stream, should_stop)) is not None:
                    if piece.text and not texts:
                        counts.first_s = perf_counter() - began
                    if piece.text:
                        texts.append(piece.text)
                        print(for_terminal(piece.text), end="", flush=True)
                    reason = piece.finish_reason or reason
                    counts.prompt_tokens = piece.prompt_tokens or counts.prompt_tokens
                    counts.completion_tokens = piece.completion_tokens or counts.completion_tokens
            except _Stopped:
                reason = "abort"
        counts.all_s = perf_counter() - began
        for each in fields(counts):
            total = getattr(self._statistics, each.name) + getattr(counts, each.name)
            setattr(self._statistics, each.name, total)
        return RemoteAnswer("".join(texts), reason)

    def forget(self) -> None:
        """Nothing is kept here; each request has the whole conversation."""

    def print_statistics(self) -> None:
        """Print tokens and times."""
        found = self._statistics
        rest_s = found.all_s - found.first_s
        rate = found.completion_tokens / rest_s if rest_s > 0 else 0.0
        say(
            f"{found.answers} answers: {found.prompt_tokens} prompt tokens, first text after "
            f"{found.first_s:.2f} s, {found.completion_tokens} tokens in {rest_s:.2f} s "
            f"({rate:.1f} a second)"
        )


class _Stopped(BaseException):
    """Ctrl-C while the server is being waited for."""


def _next(stream: Iterator[Piece], should_stop: Callable[[], bool]) -> Piece | None:
    """The next piece; None at the end.

    Raises:
        _Stopped: Ctrl-C came before it.
    """
    with _interruptible():
        if should_stop():
            raise _Stopped
        return next(stream, None)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end what waits in this block: a flag would be seen after the wait only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
