"""Runs forward passes in turn: the TEE computes for one while a worker computes for another."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from time import perf_counter

from torch import Tensor

from tsqp.tee.offload.offload import Embedding, Layer, Linear, Offload, Pending, Ready, Request
from tsqp.tee.stats import Stats, Timer

ForwardPass = Generator[Request, Tensor, Tensor]


def run_interleaved(
    offload: Offload,
    passes: Sequence[ForwardPass],
    stats: Stats,
    check: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Run several forward passes in turn, and return what each of them returns.

    The request of one pass is started before waiting for the answer of another. A pass whose answer
    is available at once continues at once. No pass overtakes an earlier one, so a later pass may
    hold the later tokens of the same prompt. An exception of a pass or of the offload closes all
    passes, cancels the open requests, and is passed to the caller. `check` is called before each
    operation, and may raise one.
    """
    results: dict[int, Tensor] = {}
    started: deque[tuple[int, Timer, Pending]] = deque()

    def start(request: Request) -> tuple[Timer, Pending]:
        check()
        timer = stats.time(_kind(request))
        with timer:
            return timer, offload.start(request)

    def advance(number: int, timer: Timer, pending: Pending) -> None:
        """Wait for an answer, and continue until an answer is not available at once."""
        while True:
            began = perf_counter()
            with pending as answer:
                timer.seconds += perf_counter() - began
                stats.wait_s += pending.waited_s
                try:
                    request = passes[number].send(answer)
                except StopIteration as end:
                    results[number] = end.value
                    return
                timer, pending = start(request)
                if not isinstance(pending, Ready):
                    started.append((number, timer, pending))
                    return

    try:
        for number, forward in enumerate(passes):
            timer, pending = start(next(forward))
            if isinstance(pending, Ready):
                advance(number, timer, pending)
            else:
                started.append((number, timer, pending))
        while started:
            advance(*started.popleft())
    finally:
        for _, _, pending in started:
            pending.cancel()
        for forward in passes:
            forward.close()
    return [results[number] for number in range(len(passes))]


def _kind(request: Request) -> str:
    if isinstance(request, Embedding):
        return "embedding"
    if isinstance(request, Layer):
        return "layer"
    return "linear" if isinstance(request, Linear) else "attention"
