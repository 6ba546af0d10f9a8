"""Several forward passes in turn, so that this side works on one while the worker has another."""

from collections import deque
from collections.abc import Generator, Sequence
from time import perf_counter

from torch import Tensor

from tsqp.tee.offload.base import Attention, Embedding, Offload, Pending, Ready, Request
from tsqp.tee.stats import Stats, Timer

Lane = Generator[Request, Tensor, Tensor]


def run_lanes(offload: Offload, lanes: Sequence[Lane], stats: Stats) -> list[Tensor]:
    """Drive several forward passes at once, in turn, and return what each returns.

    The request of one lane is started before the answer of another is waited for; a lane whose
    answer is there at once goes on at once. Whatever is raised, by a lane or by the offload, closes
    all lanes, gives up the answers that are out, and goes on to the caller.
    """
    results: dict[int, Tensor] = {}
    started: deque[tuple[int, Timer, Pending]] = deque()

    def start(lane: int, request: Request) -> None:
        timer = stats.time(_kind(request))
        with timer:
            pending = offload.start(request)
        entry = (lane, timer, pending)
        if isinstance(pending, Ready):
            started.appendleft(entry)
        else:
            started.append(entry)

    try:
        for lane, generator in enumerate(lanes):
            start(lane, next(generator))
        while started:
            lane, timer, pending = started.popleft()
            began = perf_counter()
            with pending as answer:
                timer.seconds += perf_counter() - began
                stats.wait_s += pending.waited_s
                try:
                    start(lane, lanes[lane].send(answer))
                except StopIteration as end:
                    results[lane] = end.value
    finally:
        for _, _, pending in started:
            pending.cancel()
        for generator in lanes:
            generator.close()
    return [results[lane] for lane in range(len(lanes))]


def _kind(request: Request) -> str:
    if isinstance(request, Embedding):
        return "embedding"
    return "attention" if isinstance(request, Attention) else "linear"
