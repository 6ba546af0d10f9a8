"""Several forward passes in turn, so that this side works on one while the worker has another."""

from collections import deque
from collections.abc import Generator, Sequence
from time import perf_counter

from torch import Tensor

from tsqp.tee.offload.base import Embedding, Layer, Linear, Offload, Pending, Ready, Request
from tsqp.tee.stats import Stats, Timer

Lane = Generator[Request, Tensor, Tensor]


def run_lanes(offload: Offload, lanes: Sequence[Lane], stats: Stats) -> list[Tensor]:
    """Drive several forward passes at once, in turn, and return what each returns.

    The request of one lane is started before the answer of another is waited for; a lane whose
    answer is there at once goes on at once. A lane is never ahead of one before it, so a prompt's
    later tokens may follow its earlier ones in the next lane. Whatever is raised, by a lane or by
    the offload, closes all lanes, gives up the answers that are out, and goes on to the caller.
    """
    results: dict[int, Tensor] = {}
    started: deque[tuple[int, Timer, Pending]] = deque()

    def start(request: Request) -> tuple[Timer, Pending]:
        timer = stats.time(_kind(request))
        with timer:
            return timer, offload.start(request)

    def advance(lane: int, timer: Timer, pending: Pending) -> None:
        """Wait for an answer, and go on until the next that is not there at once."""
        while True:
            began = perf_counter()
            with pending as answer:
                timer.seconds += perf_counter() - began
                stats.wait_s += pending.waited_s
                try:
                    request = lanes[lane].send(answer)
                except StopIteration as end:
                    results[lane] = end.value
                    return
                timer, pending = start(request)
                if not isinstance(pending, Ready):
                    started.append((lane, timer, pending))
                    return

    try:
        for lane, generator in enumerate(lanes):
            timer, pending = start(next(generator))
            if isinstance(pending, Ready):
                advance(lane, timer, pending)
            else:
                started.append((lane, timer, pending))
        while started:
            advance(*started.popleft())
    finally:
        for _, _, pending in started:
            pending.cancel()
        for generator in lanes:
            generator.close()
    return [results[lane] for lane in range(len(lanes))]


def _kind(request: Request) -> str:
    if isinstance(request, Embedding):
        return "embedding"
    if isinstance(request, Layer):
        return "layer"
    return "linear" if isinstance(request, Linear) else "attention"
