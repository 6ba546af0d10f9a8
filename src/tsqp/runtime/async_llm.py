"""`AsyncLLM`: a model for programs with an event loop, such as a server."""

import asyncio
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from tsqp.errors import QueueFull, UsageError, WorkerLost
from tsqp.runtime.answer_stream import AnswerStream, Request
from tsqp.runtime.async_ends import Ends
from tsqp.runtime.engine_thread import CLOSED, FAILED, LOST, READY, EngineThread
from tsqp.runtime.failover import WorkerStatus
from tsqp.runtime.loaded_model import LoadedModel
from tsqp.runtime.options import Options, show_options
from tsqp.runtime.request_stats import RequestObserver
from tsqp.tee.crypto.pad_pool import PadStats
from tsqp.tee.placement import Placement
from tsqp.tee.request_checks import one_params, one_prompt
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.stats import Stats
from tsqp.tee.text.tokenizer import Tokenizer
from tsqp.tee.worker_view import WorkerView
from tsqp.wire.channel import Counters

T = TypeVar("T")

TEXT_THREADS = 2
GRAMMAR_THREADS = 1  # a grammar takes up to two seconds, and must not hold up the tokenizing
DRAINING = "draining"
LOOK_S = 0.05  # how often `drain` looks whether all requests have ended


class AsyncLLM:
    """A model that answers many requests at once, without blocking the event loop.

    A thread of its own computes: each step is the next token, or a piece of the prompt, of every
    running request. Requests join and leave between two steps. An error of one request does not
    touch the others. After a worker was lost, it is tried again with increasing pauses, and another
    one takes over if several were given; running requests then compute again what they need.

    It may be used as an async context manager. `add` and `AnswerStream` belong in an event loop;
    everything else may be called by any thread. A program with secret prompts should call
    `tsqp.harden_process` first.
    """

    def __init__(
        self,
        model: str,
        options: Options | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        on_load: Callable[[int, int], None] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_queued_reqs: int | None = None,
        reconnect_s: float = 60.0,
        observer: RequestObserver | None = None,
        worker_view: WorkerView | None = None,
        **given: Any,
    ) -> None:
        """Load what this side needs and open a session with a worker, or with each of shares.

        Loading takes a while: in a running event loop, call it with `asyncio.to_thread`.

        Args:
            model, options, tokenizer, on_load: see `LLM`.
            max_model_len: a lower maximum number of tokens of prompt and answer than the model's.
            max_num_seqs: maximum number of answers that run at the same time; others wait.
            max_num_queued_reqs: maximum number of answers that wait; None for no limit.
            reconnect_s: for how many seconds a lost worker is tried again before the requests that
                need it fail. It is tried again after that too, and new requests are refused
                meanwhile.
            observer: told of the progress of requests, by the thread that computes.
            worker_view: samples what the workers receive of each request, to be looked at.

        Raises:
            UsageError, ModelError, WorkerError: see `LLM`.
        """
        if options is not None and given:
            raise UsageError("Give options as one object, or as keywords, but not both.")
        for name, least, value in (
            ("max_model_len", 2, max_model_len),
            ("max_num_seqs", 1, max_num_seqs),
            ("max_num_queued_reqs", 0, max_num_queued_reqs),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; it must be {least} or more.")
        self._pid = os.getpid()
        self._draining = False
        self._thread = EngineThread(
            max_num_seqs=max_num_seqs,
            max_queued=max_num_queued_reqs,
            reconnect_s=reconnect_s,
            observer=observer,
            worker_view=worker_view,
        )
        self._text = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="tsqp-text")
        self._grammars = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="tsqp-grammar")
        self._ends = Ends(self._thread, self._text, self._grammars)
        # Nothing of the ends refers to this object, so that the last reference to it ends all.
        weakref.finalize(self, self._ends.close).atexit = False  # which `_close_all` does
        try:
            self._model = LoadedModel(
                model,
                Options(**given) if options is None else options,
                tokenizer=tokenizer,
                on_load=on_load,
                at_end=self._ends.add,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                renew=self._thread.renew,
                worker_view=worker_view,
            )
            self._model.tokenizer.preload()  # later it would block an event loop
            self._thread.start(self._model.engine)
        except BaseException:
            self.close()
            raise
        self.config, self.dtype = self._model.config, self._model.dtype
        self.privacy = self._model.options.privacy

    def add(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AnswerStream:
        """Queue one prompt; returns its answers as they grow, and does not wait.

        Args:
            prompt: a text or token ids.
            params: the sampling parameters; with `n` above 1 there are several answers.
            request_id: a name for this request; None makes a random one.
            tenant: whose request it is. Nothing that one tenant sent is reused for another one,
                and nothing at all without a tenant.
            cache_salt: requests of one tenant with different salts reuse nothing of each other.

        Returns:
            a stream. An error of the prompt or the parameters, or of the computation, is raised by
            the stream; `AnswerStream.accepted` waits until the prompt was checked.

        Raises:
            QueueFull: too many requests are waiting.
            PromptError: the prompt is neither text nor token ids.
            WorkerLost: the worker is lost, and is being tried again.
            TSQPError: nothing can be computed any more, for example after an IntegrityError.
            UsageError: the AsyncLLM is closed or draining, or there is no running event loop.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UsageError("Call AsyncLLM.add in a running event loop.") from None
        given, params = one_prompt(prompt), one_params(params)
        self._check()
        if not self._thread.let_in(params.n):
            raise QueueFull("Too many requests are waiting; try again later.")
        request = Request(
            request_id or secrets.token_hex(16),
            () if isinstance(given, str) else given,
            params,
            tenant,
            cache_salt,
            loop,
        )
        if params.structured_outputs is not None:
            self._grammars.submit(self._thread.prepare, request, self._model.tokenizer, given)
        elif isinstance(given, str):
            self._text.submit(self._thread.prepare, request, self._model.tokenizer, given)
        else:
            self._thread.add(request)
        return AnswerStream(request, self._thread.abort)

    async def abort(self, stream: AnswerStream) -> None:
        """Give up a request; its sequence is freed before the next step."""
        await stream.aclose()

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Raises:
            TokenizerError: the model has no tokenizer.
            PromptError: the text is not valid Unicode.
        """
        tokenizer = self._model.tokenizer
        return await self._in_text_thread(
            partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        )

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        split_special: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, put into the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, see `LLM.chat`.
            tools: what the model may call, as JSON schemas.
            split_special: treat control tokens in messages and tools as plain text.
            add_generation_prompt: whether the text ends where an answer begins.
            continue_final_message: let the model continue the last message; not with
                `add_generation_prompt`.
            template_kwargs: further values for the template, such as `enable_thinking`.

        Raises:
            TokenizerError: the model has no chat template, or the template fails.
            PromptError: it is not a conversation, or the template refuses it.
        """
        return await self._in_text_thread(
            partial(
                self._model.tokenizer.encode_chat,
                messages,
                tools=tools,
                split_special=split_special,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=template_kwargs,
            )
        )

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of some token ids, special ones left out.

        Raises:
            TokenizerError: the model has no tokenizer, or an id has more than 32 bits.
        """
        return await self._in_text_thread(partial(self._model.tokenizer.decode, token_ids))

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; none for a special or unknown token."""
        tokenizer = self._model.tokenizer
        return (tokenizer.bytes_of(token_id) or b"") if tokenizer.exists else b""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; for a special token, its name.

        Empty if the vocabulary has no such token, or the model no tokenizer.
        """
        tokenizer = self._model.tokenizer
        return tokenizer.token_bytes(token_id) if tokenizer.exists else b""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model has a tokenizer that can be read."""
        return self._model.tokenizer.exists

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token, by its text; empty if the model has no tokenizer."""
        return self._model.tokenizer.special_ids if self.has_tokenizer else {}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The model's chat template in Jinja, or several by name; None without one."""
        return self._model.tokenizer.chat_template_source if self.has_tokenizer else None

    @property
    def status(self) -> str:
        """In a word, what new requests can expect.

        "ready"; "reconnecting" (the worker was lost, requests wait for it); "lost" (it was tried
        for long, and still is; requests are refused); "failed" (for good: every worker gave a wrong
        answer, or broke the protocol); "draining" or "closed".
        """
        status = self._thread.status
        return DRAINING if self._draining and status == READY else status

    @property
    def is_healthy(self) -> bool:
        """Whether the status is "ready"."""
        return self.status == READY

    @property
    def num_running(self) -> int:
        """Number of answers that are being computed."""
        return self._thread.num_running

    @property
    def num_waiting(self) -> int:
        """Number of answers that wait until there is room."""
        return self._thread.num_waiting

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its answer, in the context and in memory."""
        return self._model.engine.max_model_len

    @property
    def kv_usage(self) -> float:
        """The part of the memory for keys and values that is in use; 0 if it has no limit."""
        return self._model.engine.kv_usage

    @property
    def reconnects(self) -> int:
        """How often new sessions with workers were begun after the end of others."""
        return self._thread.reconnects

    @property
    def workers(self) -> list[WorkerStatus]:
        """Whether each worker is used, in the order given."""
        return self._model.failover.statuses

    @property
    def integrity_failures(self) -> int:
        """How often a wrong answer of a worker was detected."""
        return self._model.failover.integrity_failures

    @property
    def field(self) -> str | None:
        """The field of the residues, see `Options`; None where nothing is masked."""
        return self._model.options.field if self._model.options.masked else None

    @property
    def model_digest(self) -> str:
        """See `LLM.model_digest`."""
        return self._model.model_digest

    @property
    def stats(self) -> Stats:
        """Where the time of this side went since it was loaded."""
        return self._model.engine.stats

    @property
    def placement(self) -> Placement:
        """Which side runs which operation."""
        return self._model.offload.placement

    @property
    def transport(self) -> str:
        """See `LLM.transport`."""
        return self._model.sessions.transport

    @property
    def transport_reason(self) -> str:
        """Why this transport."""
        return self._model.sessions.transport_reason

    @property
    def rpc(self) -> Counters:
        """See `LLM.rpc`."""
        return self._model.rpc

    @property
    def pads(self) -> PadStats | None:
        """See `LLM.pads`."""
        return None if self._model.pads is None else self._model.pads.stats

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests, and wait until the others have ended.

        Args:
            timeout: for how many seconds to wait; None for no limit.

        Returns:
            whether all of them ended.
        """
        self._draining = True
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while self.num_running or self.num_waiting:
            if end is not None and loop.time() >= end:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    def close(self) -> None:
        """End all requests and sessions, and stop local workers; safe to call twice.

        Requests that are not complete fail with a UsageError. This waits for the current step, so
        in an event loop use `async with`, or `asyncio.to_thread`. In a forked process it does
        nothing, because everything belongs to the parent.

        Raises:
            UsageError: the current step does not end within a minute.
        """
        self._ends.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise UsageError(
                "This AsyncLLM belongs to the process that this one was forked from; make a new "
                "one in this process."
            )
        status, failure = self._thread.status, self._thread.failure
        if status == CLOSED or self._ends.closed:
            raise UsageError("This AsyncLLM is closed; make a new one.")
        if self._draining:
            raise UsageError("This AsyncLLM takes no new requests, because it is about to end.")
        if status == FAILED:
            raise type(failure)(*failure.args) if failure else UsageError("The engine has stopped.")
        if status == LOST:
            raise WorkerLost("The worker is lost, and is being tried again; try again later.")

    async def _in_text_thread(self, work: Callable[[], T]) -> T:
        if self._ends.closed:
            raise UsageError("This AsyncLLM is closed; make a new one.")
        return await asyncio.get_running_loop().run_in_executor(self._text, work)


show_options(AsyncLLM)
