"""A worker that was lost is asked again: requests go on, with fresh masks and the same tokens."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
from protocol_helpers import Commands

from tsqp import LLM, SamplingParams
from tsqp.errors import WorkerLost
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.wire import client

MODEL = "random:tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4] * 20]


def answers(llm: LLM, should_stop: Callable[[], bool] | None = None) -> list[tuple[int, ...]]:
    completions = llm.generate(PROMPTS, GREEDY, should_stop=should_stop)
    return [completion.token_ids for completion in completions]


class Taken:
    """The masks that all pools gave out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[bytes] = []
        take = PadPool.take

        def noting(pool: PadPool, key: Any, rows: int) -> Pads:
            pads = take(pool, key, rows)
            self.rows += [pads.copy([n]).r_ND.tobytes() for n in range(rows)]
            return pads

        monkeypatch.setattr(PadPool, "take", noting)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"privacy": "open"}, marks=pytest.mark.slow),
        {"privacy": "pad", "field": "wide"},
        pytest.param({"privacy": "pad", "field": "lattice"}, marks=pytest.mark.slow),
        pytest.param(
            {"privacy": "shares", "worker": ["local", "local"], "insecure_same_host": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["open", "pads", "lattice masks", "shares"],
)
def test_a_local_worker_that_is_killed_is_started_again(
    options: dict[str, Any], commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(monkeypatch)
    with LLM(MODEL, threads=1, **({"worker": "local", "pad_memory": 2**20} | options)) as llm:
        killed: list[int] = []

        def kill() -> None:
            local = llm._workers[-1]._local
            assert local is not None
            killed.append(local._process.pid)
            local._process.kill()
            local._process.wait(30)

        def kill_in_the_third_step() -> bool:
            steps.append(1)
            if len(steps) == 3:
                kill()
            return False

        steps: list[int] = []
        expected, scores = answers(llm), llm.score(PROMPTS[1]).logprobs_T.tolist()
        assert answers(llm, kill_in_the_third_step) == expected
        kill()  # between two calls
        assert answers(llm) == expected
        kill()
        assert llm.score(PROMPTS[1]).logprobs_T.tolist() == scores
        assert len(set(killed)) == 3
        assert bool(taken.rows) == (options["privacy"] == "pad")
        assert len(set(taken.rows)) == len(taken.rows)


def test_a_worker_that_comes_back_at_its_endpoint_is_used_by_the_next_call(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = commands.worker(MODEL, commands.ipc())
    with LLM(MODEL, privacy="pad", worker=commands.ipc(), threads=1, timeout=30) as llm:
        expected = answers(llm)
        worker.send(signal.SIGKILL)
        worker.ends()
        with monkeypatch.context() as soon:
            soon.setattr(client, "CONNECT_S", 0.5)
            for _ in range(2):
                with pytest.raises(WorkerLost, match=r"is gone|has ended"):
                    answers(llm)
        commands.worker(MODEL, commands.ipc())
        assert answers(llm) == expected
