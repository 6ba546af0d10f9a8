"""The answers of one request of an `AsyncLLM`, as they grow."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import monotonic
from types import TracebackType
from typing import Self

from tsqp.runtime.admission import Place
from tsqp.tee.sampling import Completion, FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """What was added to one answer of a request.

    Attributes:
        index: which of the `n` answers.
        text: the new text; empty if the new tokens complete no character, or without a tokenizer.
        token_ids: the new tokens, including the end-of-sequence token.
        logprobs: one for each of the `token_ids`; None unless requested.
        completion: the whole answer, once it has ended.
        prompt_logprobs: one for each token of the prompt, with the first tokens of each answer;
            None unless requested.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    completion: Completion | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer has ended; None while it goes on."""
        return None if self.completion is None else self.completion.finish_reason

    def followed_by(self, other: "StreamOutput") -> "StreamOutput":
        """Both as one; they belong to the same answer."""
        logprobs = None if self.logprobs is None else self.logprobs + (other.logprobs or ())
        return replace(
            other,
            text=self.text + other.text,
            token_ids=self.token_ids + other.token_ids,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a request.

    Attributes:
        prompt_tokens: of the prompt.
        completion_tokens: of all its answers so far.
        cached_tokens: of the prompt, whose keys and values were reused.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class RequestTimes:
    """When the stages of a request began, by time.monotonic; None for those that did not."""

    arrived: float = field(default_factory=monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


# What the computing thread hands to the event loop: outputs, and how it ended.
_Item = StreamOutput | BaseException | None
_END = None


@dataclass(slots=True, eq=False)
class Request:
    """One request, as the computing thread and the event loop share it.

    The event loop reads and writes `pending`, `waiter` and `accepted`. The thread does the rest.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    tenant: str
    cache_salt: str
    loop: asyncio.AbstractEventLoop
    place: Place  # until the engine has it
    preparing: Future[None] | None = None  # its tokenizing, or the compilation of its grammar
    times: RequestTimes = field(default_factory=RequestTimes)
    sequences: dict[int, int] = field(default_factory=dict)  # unfinished ones, and their index
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    has_begun: bool = False  # the engine has taken it
    has_ended: bool = False
    pending: deque[_Item] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None
    accepted: bool = False

    def put(self, items: Sequence[_Item]) -> None:
        """Take what the thread hands over; called in the event loop."""
        self.pending.extend(items)
        self.accepted = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class AnswerStream:
    """The answers to one request, as they grow: an async iterator of `StreamOutput`.

    Outputs that nobody has taken yet are joined, so a slow reader gets longer pieces. The request
    is given up when the iteration is cancelled, when the stream is closed, and when nobody holds it
    any more. It belongs to the event loop that made it.
    """

    def __init__(self, request: Request, abort: Callable[[Request], None]) -> None:
        self._request = request
        self._abort = abort
        self._closed = False
        self._completion_tokens = 0

    @property
    def request_id(self) -> str:
        """The id that was given, or a random one."""
        return self._request.id

    @property
    def usage(self) -> Usage:
        """The numbers of tokens, of the answers as far as they were taken."""
        request = self._request
        return Usage(request.prompt_tokens, self._completion_tokens, request.cached_tokens)

    async def accepted(self) -> None:
        """Wait until the engine has taken the request.

        Raises:
            PromptError: the prompt or the parameters cannot be served.
            TSQPError: the request has failed.
        """
        while not self._request.accepted:
            await self._wait()
        if self._request.pending and isinstance(error := self._request.pending[0], BaseException):
            self._closed = True
            raise error

    async def completions(self) -> list[Completion]:
        """Wait for the end, and return all answers, in the order of their indices."""
        found = [each.completion async for each in self if each.completion is not None]
        return sorted(found, key=lambda each: each.index)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamOutput:
        if self._closed:
            raise StopAsyncIteration
        pending = self._request.pending
        while not pending:
            await self._wait()
        item = pending.popleft()
        if item is _END:
            self._closed = True
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            self._closed = True
            try:
                raise item
            finally:
                del item  # its traceback refers to this frame
        while pending and isinstance(more := pending[0], StreamOutput):
            if more.index != item.index:
                break
            item = item.followed_by(more)
            pending.popleft()
        self._completion_tokens += len(item.token_ids)
        return item

    async def aclose(self) -> None:
        """Give the request up, unless it has ended; safe to call twice."""
        self._end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def __del__(self) -> None:
        self._end()

    async def _wait(self) -> None:
        request = self._request
        request.waiter = request.loop.create_future()
        try:
            await request.waiter
        except asyncio.CancelledError:
            self._end()
            raise
        finally:
            request.waiter = None

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            self._abort(self._request)
