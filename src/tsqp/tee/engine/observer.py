"""The clocks and the log of an engine's steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, perf_counter, process_time

from tsqp.tee.call_log import CallLog
from tsqp.tee.cpu_clock import MonotonicClock
from tsqp.tee.engine.sequence import Chunk
from tsqp.tee.stats import Stats


class Step:
    """Counts what one step computes. A step that fails is not counted."""

    def __init__(
        self,
        stats: Stats,
        call_log: CallLog | None,
        on_chunks: Callable[[Sequence[Chunk]], None] | None = None,
    ) -> None:
        self._stats = stats
        self._call_log = call_log
        self._on_chunks = on_chunks
        self.prompt_tokens = 0
        self.decode_tokens = 0
        self.failed = False

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Set the chunks of the step. A step with any prompt tokens counts as prefill."""
        self.prompt_tokens = sum(c.length for c in chunks if c.sequence.in_prompt)
        self.decode_tokens = 0 if self.prompt_tokens else len(chunks)
        if self._call_log is not None:
            self._call_log.begin_step("prefill" if self.prompt_tokens else "decode", self._stats)
        if self._on_chunks is not None:
            self._on_chunks(chunks)


class Observer:
    """Measures the steps of an engine.

    Args:
        stats: receives the times and numbers of tokens.
        cpu_clock: returns the seconds of processor time that count as work of the steps. A step in
            which it goes back counts as none.
        call_log: notified of each step.
        clock: seconds, for the times of requests.
        on_chunks: called with the chunks of each step.
    """

    def __init__(
        self,
        stats: Stats | None = None,
        cpu_clock: Callable[[], float] = process_time,
        call_log: CallLog | None = None,
        clock: Callable[[], float] = monotonic,
        on_chunks: Callable[[Sequence[Chunk]], None] | None = None,
    ) -> None:
        self.now = clock
        self.stats = Stats() if stats is None else stats
        self._cpu_clock = MonotonicClock(cpu_clock)
        self._call_log = call_log
        self._on_chunks = on_chunks

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Measure the step that runs in the `with` block."""
        log, stats = self._call_log, self.stats
        if log is not None:
            log.flush()
        began, cpu_began = perf_counter(), self._cpu_clock()
        step = Step(stats, log, self._on_chunks)
        try:
            yield step
        except BaseException:
            step.failed = True
            raise
        finally:
            seconds, cpu_seconds = perf_counter() - began, self._cpu_clock() - cpu_began
            if step.failed:
                tokens = 0
            elif step.prompt_tokens:
                tokens = step.prompt_tokens
                stats.prefill_tokens += tokens
                stats.prefill_s += seconds
                stats.prefill_cpu_s += cpu_seconds
            else:
                tokens = step.decode_tokens
                stats.decode_tokens += tokens
                stats.decode_s += seconds
                stats.decode_cpu_s += cpu_seconds
            if log is not None:
                log.end_step(stats, seconds, cpu_seconds, tokens)
