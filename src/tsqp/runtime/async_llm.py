"""`AsyncLLM`: a model for programs with an event loop, such as a server."""

import asyncio
import os
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from tsqp.errors import UsageError, WorkerLost
from tsqp.runtime.admission import Admission, Place
from tsqp.runtime.answer_stream import AnswerStream, Request
from tsqp.runtime.async_ends import Ends
from tsqp.runtime.async_text import CLOSED_TEXT, AsyncText
from tsqp.runtime.dropped import call_when_dropped
from tsqp.runtime.engine_thread import CLOSED, FAILED, LOST, READY, EngineThread
from tsqp.runtime.failover import WorkerStatus
from tsqp.runtime.fair_pool import FairPool
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

TEXT_THREADS = 2
GRAMMAR_THREADS = 1  # a grammar takes up to two seconds, and must not hold up the tokenizing
DRAINING = "draining"
LOOK_S = 0.05  # how often `drain` looks whether all requests have ended


class AsyncLLM(AsyncText):
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
        share_queue: bool = False,
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
            share_queue: whether there are several tenants, of whom none may fill the queue: each
                may have half of the places that the others leave.
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
        self._admission = Admission(max_num_seqs, max_num_queued_reqs, is_shared=share_queue)
        self._thread = EngineThread(
            self._admission,
            reconnect_s=reconnect_s,
            observer=observer,
            worker_view=worker_view,
        )
        self._text = FairPool(TEXT_THREADS, "tsqp-text")
        self._grammars = FairPool(GRAMMAR_THREADS, "tsqp-grammar")
        self._ends = Ends(self._thread, self._text, self._grammars)
        # Nothing of the ends refers to this object, so that the last reference to it ends all.
        call_when_dropped(self, self._ends.close)
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

    def admit(self, count: int = 1, tenant: str = "") -> Place:
        """Take places in the queue before there is a prompt, for `add`.

        Use it as a context manager: places that `add` was not given are then free again.

        Args:
            count: number of answers.

        Raises:
            QueueFull: too many requests are waiting, of all tenants or of this one.
            WorkerLost, TSQPError, UsageError: see `add`.
        """
        self._check()
        return self._admission.let_in(count, tenant)

    def add(
        self,
        prompt: str | Iterable[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tenant: str = "",
        cache_salt: str = "",
        place: Place | None = None,
    ) -> AnswerStream:
        """Queue one prompt; returns its answers as they grow, and does not wait.

        Args:
            prompt: a text or token ids.
            params: the sampling parameters; with `n` above 1 there are several answers.
            request_id: a name for this request; None makes a random one.
            tenant: whose request it is. Nothing that one tenant sent is reused for another one,
                and nothing at all without a tenant.
            cache_salt: requests of one tenant with different salts reuse nothing of each other.
            place: what `admit` returned for this tenant, with room for all answers; None takes it
                now.

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
        if place is None:
            place = self._admission.let_in(params.n, tenant)
        request = Request(
            request_id or secrets.token_hex(16),
            () if isinstance(given, str) else given,
            params,
            tenant,
            cache_salt,
            loop,
            place.part(params.n),
        )
        prepare = partial(self._thread.prepare, request, self._model.tokenizer, given)
        if params.structured_outputs is not None:
            request.preparing = self._grammars.submit(tenant, prepare)
        elif isinstance(given, str):
            request.preparing = self._text.submit(tenant, prepare)
        else:
            self._thread.add(request)
        return AnswerStream(request, self._thread.abort)

    async def abort(self, stream: AnswerStream) -> None:
        """Give up a request; its sequence is freed before the next step."""
        await stream.aclose()

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

        Requests that are not complete fail with a UsageError. This waits for the present operation
        of the engine, so in an event loop use `async with`, or `asyncio.to_thread`. In a forked
        process it does nothing, because everything belongs to the parent.

        Raises:
            UsageError: the operation does not end within half a minute. Sessions and local workers
                are then closed when it does.
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
            raise UsageError(CLOSED_TEXT)
        if self._draining:
            raise UsageError("This AsyncLLM takes no new requests, because it is about to end.")
        if status == FAILED:
            raise type(failure)(*failure.args) if failure else UsageError("The engine has stopped.")
        if status == LOST:
            raise WorkerLost("The worker is lost, and is being tried again; try again later.")


show_options(AsyncLLM)
