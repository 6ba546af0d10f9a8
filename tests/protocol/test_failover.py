"""Several workers of one `LLM`: another takes over, and one that lied is never asked again."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liars import LyingWorker
from lies import MODEL, Order
from lying_sessions import complete, right_tokens
from protocol_helpers import Commands, Running
from torch import Tensor

from tsqp import LLM, WorkerStatus
from tsqp.errors import IntegrityError, LatticeError, TSQPError, WorkerError, WorkerUnavailable
from tsqp.gpu.worker import Worker
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.offload import lattice_group

pytestmark = pytest.mark.usefixtures("limit")

LATE = {"layer": 1, "group": "down", "after": 20}  # in the third step
KILL_AT = 3


@pytest.fixture(scope="module")
def second_liar(shared_commands: Commands) -> Iterator[LyingWorker]:
    liar = LyingWorker(shared_commands, "second")
    try:
        liar.running.says("serving ")
        yield liar
        liar.close()
    finally:
        liar.running.stop()


def several(*endpoints: str, **options: Any) -> LLM:
    return LLM(MODEL, worker=endpoints, **({"pad_memory": 0} | options))


def states(llm: LLM) -> list[tuple[str, str | None]]:
    return [(each.state, each.error) for each in llm._model.failover.statuses]


def kill(worker: Running, endpoint: str) -> None:
    """Kill a worker, and remove the socket that it leaves behind."""
    worker.send(signal.SIGKILL)
    worker.ends()
    Path(endpoint.removeprefix("ipc://")).unlink()


def takes_over(log: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in log.records if "takes over" in each.message]


@pytest.mark.parametrize(
    ("lie", "error", "field"),
    [
        ("one bit flipped", "IntegrityError", "wide"),
        pytest.param("a row off by one", "IntegrityError", "compact", marks=pytest.mark.slow),
        ("one bit flipped", "IntegrityError", "lattice"),
        pytest.param("babbles", "ProtocolError", "wide", marks=pytest.mark.slow),
    ],
)
def test_an_honest_worker_takes_over_and_the_liar_is_never_asked_again(
    lie: str,
    error: str,
    field: str,
    liar: LyingWorker,
    commands: Commands,
    gives_up_soon: None,
    limit: FailureLimit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    masks: list[bytes] = []
    take = PadPool.take

    def noting(pool: PadPool, key: Any, rows: int) -> Pads:
        pads = take(pool, key, rows)
        masks.extend(pads.copy([n]).r_ND.tobytes() for n in range(rows))
        return pads

    monkeypatch.setattr(PadPool, "take", noting)
    honest = commands.worker(MODEL, commands.ipc())
    liar.order(Order(lie, **LATE))
    before = liar.sessions
    with several(liar.endpoint, commands.ipc(), field=field) as llm:
        assert states(llm) == [("in use", None), ("standby", None)]
        assert complete(llm) == right_tokens(field)
        assert states(llm) == [("quarantined", error), ("in use", None)]
        assert takes_over(caplog) == [
            f"the worker at {commands.ipc()} takes over from the worker at {liar.endpoint}"
        ]
        assert liar.sessions == before + 1
        liar.order(Order())  # honest from now on, but nobody asks
        assert complete(llm) == right_tokens(field)
        kill(honest, commands.ipc())
        for _ in range(2):
            with pytest.raises(WorkerError):
                complete(llm)
        assert states(llm) == [("quarantined", error), ("lost", None)]
        commands.worker(MODEL, commands.ipc())
        assert complete(llm) == right_tokens(field)
    assert liar.sessions == before + 1
    assert len(set(masks)) == len(masks) > 0
    assert limit._left == MAX_FAILURES - (error == "IntegrityError")


def test_where_all_workers_lie_everything_fails_for_good(
    liar: LyingWorker, second_liar: LyingWorker, limit: FailureLimit, sampled: list[int]
) -> None:
    right = right_tokens()
    sampled.clear()
    liars = [liar, second_liar]
    before = [each.sessions for each in liars]
    liar.order(Order("zeros", **LATE))
    second_liar.order(Order("zeros", layer=1, group="down"))
    with several(liar.endpoint, second_liar.endpoint) as llm:
        with pytest.raises(IntegrityError, match="wrong product"):
            complete(llm)
        assert states(llm) == [("quarantined", "IntegrityError")] * 2
        for each in liars:
            each.order(Order())
        with pytest.raises(IntegrityError):
            complete(llm)
        with pytest.raises(IntegrityError):
            llm.score([1, 2, 3])
    assert sampled == right[: len(sampled)]
    assert [each.sessions for each in liars] == [number + 1 for number in before]
    assert limit._left == MAX_FAILURES - 2


def test_a_request_goes_on_after_two_liars(
    liar: LyingWorker, second_liar: LyingWorker, tiny_worker: str
) -> None:
    liar.order(Order("zeros", **LATE))
    second_liar.order(Order("zeros"))
    with several(liar.endpoint, second_liar.endpoint, tiny_worker) as llm:
        assert complete(llm) == right_tokens()
        assert [state for state, _ in states(llm)] == ["quarantined", "quarantined", "in use"]
    liar.order(Order("zeros"))
    second_liar.order(Order("zeros"))
    with several(liar.endpoint, second_liar.endpoint, tiny_worker) as llm:
        with pytest.raises(IntegrityError):  # which is tried once more only
            llm.score([1, 2, 3])
        assert llm.score([1, 2, 3]).logprobs_T.shape == (2,)


def test_a_liar_whose_stand_in_is_away_for_a_while_is_not_asked_meanwhile(
    liar: LyingWorker, commands: Commands, gives_up_soon: None
) -> None:
    liar.order(Order("zeros"))
    before = liar.sessions
    with several(liar.endpoint, commands.ipc()) as llm:
        for _ in range(2):
            with pytest.raises(WorkerUnavailable):
                complete(llm)
        assert states(llm) == [("quarantined", "IntegrityError"), ("lost", None)]
        liar.order(Order())
        commands.worker(MODEL, commands.ipc())
        assert complete(llm) == right_tokens()
    assert liar.sessions == before + 1


def test_a_first_worker_that_is_not_there_is_replaced_at_the_start(
    tiny_worker: str,
    commands: Commands,
    gives_up_soon: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with several(commands.ipc(), tiny_worker, "local") as llm:
        assert complete(llm) == right_tokens()
        assert llm._model.failover.statuses == [
            WorkerStatus(commands.ipc(), "lost", None),
            WorkerStatus(tiny_worker, "in use", None),
            WorkerStatus("local", "standby", None),
        ]
        assert llm._workers[2]._local is None  # it is started when it is needed
    assert len(takes_over(caplog)) == 1


def test_a_first_worker_with_another_model_is_replaced_at_the_start(
    tiny_worker: str, commands: Commands
) -> None:
    commands.worker("random:tiny:7", commands.ipc())
    with several(commands.ipc(), tiny_worker) as llm:
        assert complete(llm) == right_tokens()
        assert states(llm) == [("lost", None), ("in use", None)]


def test_the_start_fails_with_the_first_error_where_no_worker_is_there(
    commands: Commands, gives_up_soon: None
) -> None:
    other = f"ipc://{commands.folder}/other.sock"
    with pytest.raises(WorkerUnavailable, match=r"worker\.sock"):
        several(commands.ipc(), other)


@pytest.mark.parametrize(
    "options",
    [
        {"field": "wide"},
        pytest.param({"privacy": "open", "pad_memory": None}, marks=pytest.mark.slow),
        {"privacy": "open", "attention": "gpu", "pad_memory": None},
    ],
    ids=["pad", "open", "keys and values on the worker"],
)
def test_requests_of_a_worker_that_dies_go_on_at_another(
    options: dict[str, Any], tiny_worker: str, commands: Commands, gives_up_soon: None
) -> None:
    with several(tiny_worker, **options) as llm:
        expected = complete(llm, max_tokens=8)
    first = commands.worker(MODEL, commands.ipc())
    with several(commands.ipc(), tiny_worker, **options) as llm:
        steps: list[int] = []

        def kill_once() -> bool:
            steps.append(1)
            if len(steps) == KILL_AT:
                kill(first, commands.ipc())
            return False

        generate = llm.generate
        llm.generate = lambda *given: generate(*given, should_stop=kill_once)  # type: ignore[method-assign]
        assert complete(llm, max_tokens=8) == expected
        assert len(steps) > KILL_AT
        assert states(llm) == [("lost", None), ("in use", None)]
        llm.generate = generate  # type: ignore[method-assign]
        assert complete(llm, max_tokens=8) == expected


def test_one_that_returns_is_used_when_all_were_dead(
    commands: Commands, gives_up_soon: None
) -> None:
    ends = [f"ipc://{commands.folder}/{name}.sock" for name in "ab"]
    workers = [commands.worker(MODEL, end) for end in ends]
    with several(*ends) as llm:
        for worker, end in zip(workers, ends, strict=True):
            kill(worker, end)
        with pytest.raises(TSQPError):
            complete(llm)
        assert states(llm) == [("lost", None)] * 2
        commands.worker(MODEL, ends[0])
        assert complete(llm) == right_tokens()
        assert states(llm) == [("in use", None), ("lost", None)]


@pytest.mark.parametrize("field", ["wide", "compact", "lattice"])
def test_each_worker_has_check_vectors_of_its_own(field: str) -> None:
    with several("inproc", "inproc", "inproc", field=field) as llm:
        names = ("_k_22F", "_after_F") if field == "lattice" else ("_k_2P",)
        sets = [each.begin.args[1] for each in llm._model.failover.alternatives]  # type: ignore[union-attr]
        for group in sets[0]:
            for name in names:
                drawn = [np.asarray(getattr(groups[group], name)) for groups in sets]
                for one, other in ((0, 1), (0, 2), (1, 2)):
                    same = (drawn[one] == drawn[other]) & (drawn[one] != 0)
                    assert same.mean() < 0.05, (group, name)
        expected = complete(llm)
        for number in (1, 2):  # each set has the products that belong to its vectors
            llm._model.failover.end(IntegrityError("a lie"))
            llm._offload.close()
            llm._engine._session.offload = llm._model.sessions.renew()
            assert states(llm)[number] == ("in use", None)
            assert complete(llm) == expected == right_tokens(field)


def test_check_vectors_of_a_liar_are_forgotten_and_the_others_kept(liar: LyingWorker) -> None:
    liar.order(Order("zeros"))
    with several(liar.endpoint, "inproc") as llm:
        complete(llm)
        first, second = llm._model.failover.alternatives
        assert (first.begin is None, second.begin is None) == (True, False)


@pytest.fixture
def lying_hints(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Worker]]:
    """Lets that many workers of this process lie in their third call; returns all that answer."""
    run = Worker.run

    def begin(liars: int) -> list[Worker]:
        asked: list[Worker] = []
        calls: dict[int, int] = {}

        def lying(
            worker: Worker, operation: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
        ) -> None:
            run(worker, operation, inputs, outputs)
            if worker not in asked:
                asked.append(worker)
            calls[id(worker)] = calls.get(id(worker), 0) + 1
            if asked.index(worker) < liars and calls[id(worker)] == 3:
                outputs[0][7, 11] ^= 4

        monkeypatch.setattr(Worker, "run", lying)
        return asked

    return begin


def test_another_worker_makes_the_hints_after_wrong_ones(
    lying_hints: Callable[[int], list[Worker]], limit: FailureLimit
) -> None:
    asked = lying_hints(1)
    with several("inproc", "inproc", field="lattice", hints="worker") as llm:
        assert states(llm) == [("quarantined", "IntegrityError"), ("in use", None)]
        assert complete(llm) == right_tokens("lattice")
    assert len(asked) == 2
    assert limit._left == MAX_FAILURES - 1


def test_wrong_hints_of_all_workers_end_the_start(
    lying_hints: Callable[[int], list[Worker]], limit: FailureLimit
) -> None:
    lying_hints(2)
    with pytest.raises(IntegrityError, match="made wrong hints"):
        several("inproc", "inproc", field="lattice", hints="worker")
    assert limit._left == MAX_FAILURES - 2


def test_hints_come_from_the_first_worker_that_is_there(
    tiny_worker: str, commands: Commands, gives_up_soon: None
) -> None:
    with several(commands.ipc(), tiny_worker, field="lattice", hints="worker") as llm:
        assert states(llm) == [("lost", None), ("in use", None)]
        assert complete(llm) == right_tokens("lattice")


def test_a_wrong_lattice_mask_is_no_reason_to_ask_another_worker(
    tiny_worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lattice_group, "process_switch", switch := lattice_group.Switch())
    monkeypatch.setattr("tsqp.runtime.build.process_switch", switch)
    with several(tiny_worker, "inproc", field="lattice") as llm:
        pads = llm._pads
        switch.turn_off(next(iter(llm._offload._linear._groups._groups)))  # type: ignore[attr-defined]
        for _ in range(2):
            with pytest.raises(LatticeError):
                complete(llm)
        assert states(llm)[1] == ("standby", None)
        assert llm._pads is pads  # nor is the same one asked again


def test_log_lines_of_a_takeover_hold_no_token(
    liar: LyingWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "tsqp")
    liar.order(Order("zeros"))
    with several(liar.endpoint, "inproc") as llm:
        complete(llm, [141, 358, 265])
    assert "quarantined" in caplog.text
    assert not {"141", "358", "265"} & set(caplog.text.split())
