"""The thread that drives the engine of an `AsyncLLM`."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from time import monotonic

from tsqp.errors import LatticeError, TSQPError, UsageError, WorkerLost
from tsqp.runtime.admission import Admission
from tsqp.runtime.answer_stream import Request, StreamOutput
from tsqp.runtime.request_stats import RequestObserver, RequestStats
from tsqp.runtime.tracebacks import without_foreign_messages
from tsqp.tee.engine.engine import Engine
from tsqp.tee.engine.sequence import Output
from tsqp.tee.engine.session import SESSION_OVER
from tsqp.tee.offload.offload import Offload
from tsqp.tee.sampling import FinishReason
from tsqp.tee.text.tokenizer import Tokenizer
from tsqp.tee.worker_view import WorkerView

log = logging.getLogger("tsqp")

FIRST_PAUSE_S = 0.1  # between two attempts to reach a lost worker; doubled each time
LONGEST_PAUSE_S = 5.0
JOIN_S = 30.0
CLOSED_EARLY = "The AsyncLLM was closed before the answer was complete."

READY, RECONNECTING, LOST, FAILED, CLOSED = "ready", "reconnecting", "lost", "failed", "closed"


class EngineThread:
    """Runs the requests of all event loops on one engine.

    Every method except `run` may be called by any thread, and none of them waits, except `close`.

    Args:
        admission: lets in the sequences; it asks the engine how many there are.
        reconnect_s: for how long a lost worker is tried again before its requests fail.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        reconnect_s: float,
        observer: RequestObserver | None,
        worker_view: WorkerView | None = None,
    ) -> None:
        self._admission = admission
        self._reconnect_s = reconnect_s
        self._observer = observer
        self._worker_view = worker_view
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closing = threading.Event()
        self._is_over = False
        self._at_end = threading.RLock()  # a stream may be dropped, and aborted, at any time
        self._last_act: Callable[[], None] | None = None  # of the thread, if `close` went before it
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._requests: dict[int, Request] = {}  # by sequence
        self._last_token: dict[int, float] = {}  # when, by sequence
        self._deliveries: dict[Request, list[StreamOutput | BaseException | None]] = {}
        self._reasons: dict[Request, list[FinishReason]] = {}
        self.status = READY
        self.reconnects = 0
        self.failure: TSQPError | None = None

    def start(self, engine: Engine) -> None:
        """Start the thread."""
        self._engine = self._admission.queue = engine
        self._thread = threading.Thread(target=self.run, name="tsqp-engine", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether this is the thread that calls."""
        return self._thread is threading.current_thread()

    @property
    def num_running(self) -> int:
        """Number of running sequences."""
        return 0 if self._engine is None else self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences, with those that are still being tokenized."""
        return self._admission.num_waiting

    def add(self, request: Request) -> None:
        """Queue a request that was let in."""
        self._order(lambda: self._add(request))

    def prepare(self, request: Request, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> None:
        """Tokenize the prompt of a request that was let in, compile its grammar, and queue it.

        This takes a while: up to two seconds for a grammar.
        """
        assert self._engine is not None
        error: TSQPError | None = None
        if not request.has_ended and not self._closing.is_set():  # else `_add` only counts it
            try:
                if isinstance(prompt, str):
                    request.prompt = tokenizer.encode(prompt)
                if request.params.structured_outputs is not None:
                    self._engine.compile(request.params)
            except TSQPError as exc:
                error = exc
            except Exception as exc:  # and no cause, which may quote the prompt
                error = TSQPError(f"Unexpected {type(exc).__name__} before the request was added.")
        self._order(lambda: self._add(request) if error is None else self._refuse(request, error))

    def abort(self, request: Request) -> None:
        """Give a request up; does nothing if it has ended."""
        self._order(lambda: self._abort(request))

    def close(self, after: Callable[[], None] = lambda: None) -> None:
        """End all requests, and the thread; safe to call twice.

        The present step ends before its next operation. An operation that does not end in time is
        not waited for a second time.

        Args:
            after: closes what the thread uses. The thread calls it itself if it ends too late.

        Raises:
            UsageError: the present operation does not end within JOIN_S seconds.
        """
        self._closing.set()
        if self._engine is not None:
            self._engine.cancel(UsageError(CLOSED_EARLY))
        self._inbox.put(lambda: None)
        assert not self.is_current
        if self._last_act is not None:
            return
        if self._thread is not None:
            self._thread.join(JOIN_S)
        with self._at_end:
            if self._thread is not None and not self._is_over:
                self._last_act = after
                raise UsageError(f"The engine was still computing after {JOIN_S:.0f} seconds.")
        self.status = CLOSED
        after()

    def run(self) -> None:
        """Drive the engine until the end."""
        assert self._engine is not None
        while not self._closing.is_set():
            try:
                self._turn(self._engine)
            except Exception as error:  # a fault of this file: nobody may wait for ever
                self._fail_all(_unexpected(error))
        with self._at_end:
            self._is_over = True  # from now on `_order` does what this thread did
            last_act = self._last_act
        self._finish_orders()
        if last_act is not None:
            self.status = CLOSED
            last_act()

    def _order(self, order: Callable[[], None]) -> None:
        self._inbox.put(order)
        if self._is_over:
            self._finish_orders()

    def _finish_orders(self) -> None:
        """Refuse what has come since the end."""
        with self._at_end:
            with suppress(Empty):
                while True:
                    self._inbox.get_nowait()()
            self._fail_all(UsageError(CLOSED_EARLY))
            self._deliver()

    def _turn(self, engine: Engine) -> None:
        self._take_orders(engine)
        self._deliver()
        if engine.has_unfinished:
            self._step(engine)
        elif self.status == LOST and not self._closing.is_set():
            engine.reconnect()  # so that it is there when the next request comes
        self._deliver()

    def renew(self, begin: Callable[[], Offload]) -> Offload:
        """Begin new sessions with the workers, trying for a while; called within a step.

        Raises:
            TSQPError: none could be begun.
        """
        is_spare_time = self.status == LOST  # nobody waits: one attempt is enough
        deadline = monotonic() + (0.0 if is_spare_time else self._reconnect_s)
        pause = FIRST_PAUSE_S
        if not is_spare_time:
            self.status = RECONNECTING
        while True:
            try:
                offload = begin()
            except TSQPError as error:
                if isinstance(error, SESSION_OVER) and not isinstance(error, WorkerLost):
                    self._fail_for_good(error)
                    raise
                self.status = LOST
                if monotonic() + pause > deadline or self._closing.wait(pause):
                    raise
                self.status = RECONNECTING
            except BaseException:
                self.status = LOST  # it is tried again while nothing is asked
                raise
            else:
                self.status = READY
                self.reconnects += 1
                return offload
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _take_orders(self, engine: Engine) -> None:
        with suppress(Empty):
            if not engine.has_unfinished and not self._closing.is_set():
                self._inbox.get(timeout=LONGEST_PAUSE_S if self.status == LOST else None)()
            while True:
                self._inbox.get_nowait()()

    def _add(self, request: Request) -> None:
        assert self._engine is not None
        request.place.give_back()
        if request.has_ended:  # given up meanwhile
            return
        if self._closing.is_set():
            self._end(request, UsageError(CLOSED_EARLY))
            return
        request.has_begun = True
        request.prompt_tokens = len(request.prompt)
        self._reasons[request] = []
        first: int | None = None
        try:
            for index in range(request.params.n):
                number = self._engine.add(
                    request.prompt,
                    request.params.of_answer(index),
                    tenant=request.tenant,
                    cache_salt=request.cache_salt,
                    sibling=first,
                )
                first = number if first is None else first
                request.sequences[number] = index
                self._requests[number] = request
                if self._worker_view is not None and index == 0:
                    self._worker_view.began(number, request.tenant, request.id)
        except Exception as error:
            self._end(request, error if isinstance(error, TSQPError) else _unexpected(error))
            return
        request.prompt = ()
        self._deliveries.setdefault(request, [])

    def _refuse(self, request: Request, error: TSQPError) -> None:
        request.place.give_back()
        if not request.has_ended:
            self._end(request, error)

    def _abort(self, request: Request) -> None:
        if request.has_ended:
            return
        if request.preparing is not None and request.preparing.cancel():
            request.place.give_back()
        self._end(request, None)

    def _step(self, engine: Engine) -> None:
        try:
            outputs = engine.step()
        except Exception as error:  # a fault of this program, which has ended all sequences
            self._fail_all(_unexpected(error))
            return
        now = monotonic()
        for output in outputs:
            request = self._requests.get(output.sequence)
            if request is not None:
                self._take(request, output, now)

    def _take(self, request: Request, output: Output, now: float) -> None:
        number = output.sequence
        if output.error is not None:
            if isinstance(output.error, LatticeError):  # of all others, `renew` decides
                self._fail_for_good(output.error)
            self._end(request, output.error)
            return
        request.completion_tokens += 1
        request.cached_tokens = max(request.cached_tokens, output.cached_tokens)
        self._clock(request, output, now)
        index, completion = request.sequences[number], output.completion
        if completion is not None:
            completion = replace(completion, index=index)
            self._reasons[request].append(completion.finish_reason)
            self._forget(request, number)
        assert output.token_id is not None
        self._deliveries.setdefault(request, []).append(
            StreamOutput(
                index,
                output.text,
                (output.token_id,),
                None if output.logprobs is None else (output.logprobs,),
                completion,
                output.prompt_logprobs,
            )
        )
        if not request.sequences:
            self._deliveries[request].append(None)
            self._finish(request)

    def _clock(self, request: Request, output: Output, now: float) -> None:
        times, observer, number = request.times, self._observer, output.sequence
        if times.admitted is None:
            times.admitted = output.admitted_at
        if times.first_token is None:
            times.first_token = now
            if observer is not None:
                observer.first_token(now - times.arrived)
        elif number in self._last_token and observer is not None:
            observer.next_token(now - self._last_token[number])
        times.last_token = self._last_token[number] = now

    def _end(self, request: Request, error: TSQPError | None) -> None:
        """End a request before its answers are complete; None if it was given up."""
        assert self._engine is not None
        for number in list(request.sequences):
            self._engine.abort(number)
            self._forget(request, number)
            if request.has_begun:
                self._reasons[request].append("abort" if error is None else "error")
        if error is not None:
            self._deliveries.setdefault(request, []).append(error)
        self._finish(request)

    def _forget(self, request: Request, number: int) -> None:
        del request.sequences[number], self._requests[number]
        self._last_token.pop(number, None)

    def _finish(self, request: Request) -> None:
        request.has_ended = True
        reasons = self._reasons.pop(request, None)
        if not reasons or self._observer is None:
            return  # it never ran
        times = request.times
        admitted, first, last = times.admitted, times.first_token, times.last_token
        self._observer.ended(
            RequestStats(
                tuple(reasons),
                request.prompt_tokens,
                request.completion_tokens,
                request.cached_tokens,
                queue_s=None if admitted is None else admitted - times.arrived,
                prefill_s=None if admitted is None or first is None else first - admitted,
                decode_s=None if first is None or last is None else last - first,
                e2e_s=monotonic() - times.arrived,
            )
        )

    def _fail_all(self, error: TSQPError) -> None:
        for request in set(self._requests.values()):
            self._end(request, error)

    def _fail_for_good(self, error: TSQPError) -> None:
        if self.failure is None:
            log.error("nothing is offloaded any more: %s", str(error))
        self.failure = self.failure or type(error)(*error.args)  # a traceback holds check vectors
        self.status = FAILED

    def _deliver(self) -> None:
        """Hand outputs over to the event loops: one call for each loop."""
        if not self._deliveries:
            return
        loops: dict[
            asyncio.AbstractEventLoop,
            list[tuple[Request, list[StreamOutput | BaseException | None]]],
        ] = {}
        for request, items in self._deliveries.items():
            loops.setdefault(request.loop, []).append((request, items))
        self._deliveries = {}
        for loop, deliveries in loops.items():
            try:
                loop.call_soon_threadsafe(_hand_over, deliveries)
            except RuntimeError:  # the loop is closed, so nobody reads these any more
                for request, _ in deliveries:
                    self._abort(request)


def _unexpected(error: Exception) -> TSQPError:
    log.error("an unexpected error:\n%s", without_foreign_messages(error).rstrip())
    return TSQPError(f"Unexpected {type(error).__name__}; please report it, with the log.")


def _hand_over(
    deliveries: Sequence[tuple[Request, list[StreamOutput | BaseException | None]]],
) -> None:
    for request, items in deliveries:
        request.put(items)
