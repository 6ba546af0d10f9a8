"""Memory for pads stays within its budget, however much is generated."""

import threading

import psutil
import pytest

from tsqp import LLM, SamplingParams
from tsqp.errors import UsageError

ROW_BYTES = 4 * (2 * (64 + 128 + 64 + 64 + 64 + 256 + 128 + 64) + 64 + 512)  # of random:tiny
SEQUENCES = 25


class Watch(threading.Thread):
    """Looks at the stock all the time."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(daemon=True)
        assert llm._pads is not None
        self._pool = llm._pads
        self._over = threading.Event()
        self.seen: list[int] = []
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.seen.append(self._pool.nbytes)

    def end(self) -> None:
        self._over.set()
        self.join(10)


@pytest.mark.parametrize("size", [-1, float("inf"), float("nan")])
def test_a_budget_that_is_no_number_of_bytes_is_refused(size: float) -> None:
    with pytest.raises(UsageError, match=f"pad_memory is {size}; it must be a number of bytes"):
        LLM("random:tiny", worker="inproc", pad_memory=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "tokens"),
    [("wide", 100), ("lattice", 100), pytest.param("wide", 400, marks=pytest.mark.slow)],
)
def test_thousands_of_tokens_take_no_more_memory_than_the_budget_of_pads(
    field: str, tokens: int
) -> None:
    row_bytes = ROW_BYTES * 6 // 4 if field == "lattice" else ROW_BYTES
    budget = 400 * row_bytes
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    leak = SEQUENCES * tokens * row_bytes // 4  # less than what keeping every pad would take
    prompts = [[number] for number in range(SEQUENCES)]
    process = psutil.Process()
    with LLM("random:tiny", worker="inproc", field=field, pad_memory=budget) as llm:
        llm.fill_pads()
        warm_up = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        llm.generate(prompts, warm_up)
        before, watch = process.memory_info().rss, Watch(llm)
        llm.generate(prompts, params)
        llm.fill_pads()  # on a busy machine, pads are made when nothing else runs
        watch.end()
        grown = process.memory_info().rss - before
        pads = llm.pads
    assert pads is not None
    assert pads.ahead_rows > 1000  # the stock was used, and made again
    assert len(watch.seen) > 100
    assert budget // 4 < max(watch.seen) <= budget
    assert grown < leak
