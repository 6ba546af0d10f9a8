"""Several workers for each shard of a model, which come and go while requests run."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lies import MODEL
from lying_sessions import complete, right_tokens
from protocol_helpers import Commands, eventually
from replica_workers import told_workers

from tsqp import LLM, AsyncLLM, SamplingParams
from tsqp.errors import IntegrityError, UsageError, WorkerLost
from tsqp.runtime import replicas
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit

pytestmark = pytest.mark.usefixtures("limit", "gives_up_soon", "looks_often")

PAIRS = ("1/2", "1/2", "2/2", "2/2")
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
LIED = ("quarantined", "IntegrityError")


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "POLL_S", 0.05)


def begin(*endpoints: str, **options: Any) -> LLM:
    workers = {"worker": endpoints} if endpoints else {}
    return LLM(MODEL, **({"pad_memory": 0} | workers | options))


def states(llm: LLM | AsyncLLM) -> list[tuple[str, str | None]]:
    return [(each.state, each.error) for each in llm._model.failover.statuses]


def write(path: Path, *endpoints: str) -> Path:
    new = path.with_suffix(".new")
    new.write_text("".join(f"w{n} {end}\n" for n, end in enumerate(endpoints)))
    return new.rename(path)


@pytest.mark.parametrize("field", ["wide", "compact", "lattice"])
def test_tokens_of_replicas_are_those_of_one_worker_and_all_of_them_work(
    field: str, tmp_path: Path
) -> None:
    with told_workers(tmp_path, MODEL, *PAIRS) as (ends, workers):
        with begin(*reversed(ends), field=field) as llm:
            for _ in range(2):  # the same inputs again, which the same masks would not hide
                assert complete(llm) == right_tokens(field)
            assert states(llm) == [("in use", None)] * 4
        received = [each.received for each in workers]
        assert min(map(len, received)) > 10
        assert sorted(received[0] + received[1]) == sorted(received[2] + received[3])
        assert len({*received[0], *received[1]}) == len(received[0] + received[1])


@pytest.mark.parametrize("field", ["wide", "lattice"])
def test_a_lying_replica_is_named_and_no_request_notices(
    field: str,
    tmp_path: Path,
    limit: FailureLimit,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with told_workers(tmp_path, MODEL, *PAIRS) as (ends, workers), begin(*ends, field=field) as llm:
        workers[2].lies = True
        assert complete(llm) == right_tokens(field)
        assert states(llm) == [("in use", None), ("in use", None), LIED, ("in use", None)]
        assert f"the worker at {ends[2]} is quarantined" in caplog.text
        asked, workers[2].lies = len(workers[2].received), False
        assert complete(llm) == right_tokens(field)
        assert len(workers[2].received) == asked
        # What the liar got, the other one got under another mask.
        assert not set(workers[2].received[-1:]) & set(workers[3].received)
        workers[3].lies = True
        with pytest.raises(IntegrityError, match=f"The worker at {ends[3]} "):
            complete(llm)
        assert states(llm)[2:] == [LIED, LIED]
    assert limit._left == MAX_FAILURES - 2


@pytest.mark.parametrize("field", ["wide", "lattice"])
def test_each_replica_has_check_vectors_of_its_own(field: str, tmp_path: Path) -> None:
    name = "_k_22F" if field == "lattice" else "_k_2P"
    with told_workers(tmp_path, MODEL, *PAIRS) as (ends, _), begin(*ends, field=field) as llm:
        sets = [each.groups for each in llm._model.failover.current._members]  # type: ignore[attr-defined]
        for group in sets[0]:
            for one, other in ((0, 1), (2, 3)):
                drawn = [np.asarray(getattr(sets[n][group], name)) for n in (one, other)]
                assert ((drawn[0] == drawn[1]) & (drawn[0] != 0)).mean() < 0.05


def test_a_slow_replica_is_passed_over_and_taken_back_after_a_right_answer(tmp_path: Path) -> None:
    with (
        told_workers(tmp_path, MODEL, *PAIRS[1:]) as (ends, workers),
        begin(*ends, timeout=0.3) as llm,
    ):
        workers[1].go.clear()
        assert complete(llm) == right_tokens()
        assert states(llm)[1] == ("lost", None)
        workers[1].go.set()
        assert eventually(lambda: states(llm) == [("in use", None)] * 3)
        before = len(workers[1].received)
        assert complete(llm) == right_tokens()
        assert len(workers[1].received) > before


def test_a_replica_that_returns_and_lies_is_not_taken_back(
    tmp_path: Path, limit: FailureLimit
) -> None:
    with (
        told_workers(tmp_path, MODEL, *PAIRS[1:]) as (ends, workers),
        begin(*ends, timeout=0.3) as llm,
    ):
        workers[1].go.clear()
        assert complete(llm) == right_tokens()
        workers[1].lies = True
        workers[1].go.set()
        assert eventually(lambda: states(llm)[1] == LIED)  # nobody asked anything meanwhile
        assert complete(llm) == right_tokens()
    assert limit._left == MAX_FAILURES - 1


@pytest.mark.slow
def test_a_killed_replica_loses_no_request_and_the_last_one_ends_them(commands: Commands) -> None:
    ends = [f"ipc://{commands.folder}/{n}.sock" for n in range(3)]
    running = [
        commands.worker(MODEL, end, "--shard", shard)
        for end, shard in zip(ends, ("1/2", "2/2", "2/2"), strict=True)
    ]

    def kill(place: int) -> None:
        running[place].send(signal.SIGKILL)
        running[place].ends()
        Path(ends[place].removeprefix("ipc://")).unlink()

    async def run() -> None:
        async with AsyncLLM(MODEL, worker=ends, pad_memory=0, reconnect_s=0.5) as llm:
            params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
            streams = [llm.add([3, 141, 59, n], params) for n in range(8)]
            first = [await anext(stream) for stream in streams]
            assert len(first) == 8
            kill(1)
            found = [(await each.completions())[0].token_ids for each in streams]
            assert states(llm)[1] == ("lost", None)
            again = [llm.add([3, 141, 59, n], params) for n in range(8)]
            assert [(await each.completions())[0].token_ids for each in again] == found
            assert llm.reconnects == 0

            late = [llm.add([3, 141, 59, n], params) for n in range(2)]
            kill(2)
            for each in late:
                with pytest.raises(WorkerLost):
                    await each.completions()
            running[1] = commands.worker(MODEL, ends[1], "--shard", "2/2")
            while not llm.is_healthy:
                await asyncio.sleep(0.05)
            back = llm.add([3, 141, 59, 0], params)
            assert (await back.completions())[0].token_ids == found[0]

    asyncio.run(run())


def test_workers_are_added_and_removed_while_requests_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with told_workers(tmp_path, MODEL, "1/1", "1/1", "1/1") as (ends, workers):
        path = write(tmp_path / "workers", ends[0])
        with begin(workers_file=path, field="lattice") as llm:
            steps: list[int] = []

            def change() -> bool:
                steps.append(1)
                if len(steps) == 2:
                    write(path, *ends[1:])
                    assert eventually(lambda: [each[0] for each in states(llm)] == ["in use"] * 2)
                return False

            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            expected = llm.generate([[5, 6, 7]], params)[0].token_ids
            assert not workers[1].received
            changed = llm.generate([[5, 6, 7]], params, should_stop=change)[0].token_ids
            assert changed == expected
            asked = len(workers[0].received)
            assert llm.generate([[5, 6, 7]], params)[0].token_ids == expected
            assert len(workers[0].received) == asked
            assert min(len(each.received) for each in workers[1:]) > 10

            path.write_text(f"w0 {ends[0]}\nw1 tcp://half-wr")
            assert eventually(lambda: "has no end" in caplog.text)
            path.write_text(f"w0 {ends[0]}\nw1 {ends[0]}\n")
            assert eventually(lambda: "has the endpoint of line 1" in caplog.text)
            assert caplog.text.count("the workers stay as they are") == 2
            assert llm.generate([[5, 6, 7]], params)[0].token_ids == expected
            assert states(llm) == [("in use", None)] * 2
            write(path, ends[0], ends[2])
            assert eventually(lambda: len(states(llm)) == 2 and states(llm)[1] == ("in use", None))
            assert llm.generate([[5, 6, 7]], params)[0].token_ids == expected
            assert len(workers[0].received) > asked


def test_a_liar_that_is_named_again_is_not_asked_again(tmp_path: Path) -> None:
    with told_workers(tmp_path, MODEL, "1/1", "1/1") as (ends, workers):
        path = write(tmp_path / "workers", *ends)
        with begin(workers_file=path) as llm:
            workers[0].lies = True
            assert complete(llm) == right_tokens()
            write(path, ends[1])
            assert eventually(lambda: len(states(llm)) == 1)
            asked = len(workers[0].received)
            write(path, *ends)
            assert eventually(lambda: states(llm)[1:] == [LIED])
            assert complete(llm) == right_tokens()
            assert len(workers[0].received) == asked


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no worker"),
        ("# nobody\n", "names no worker"),
        ("a tcp://one:7000", r"Line 1 of .* has no end"),
        ("a tcp://one:7000\nb\n", r"Line 2 of .*: a line is NAME ENDPOINT"),
        ("a tcp://one:7000\n\na tcp://two:7000\n", r"Line 3 of .* has the name of line 1"),
        ("a tcp://one:7000\nb tcp://one:7000\n", r"Line 2 of .* has the endpoint of line 1"),
        ("a tcp://one:7000 {key}\nb tcp://two:7000 {key}\n", r"Line 2 of .* has the key of line 1"),
        ("a local\n", r"Line 1 of .*: an endpoint is"),
        ("a tcp://one:7000 nokey\n", r"Line 1 of .*: Cannot read a key"),
        ("\x00\xff", r"not text|has no end"),
    ],
)
def test_a_wrong_file_ends_the_start(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "workers"
    path.write_bytes(
        text.replace("{key}", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7").encode("latin1")
    )
    with pytest.raises(UsageError, match=problem):
        begin(workers_file=path)


def test_a_file_and_workers_contradict_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "workers", "tcp://one:7000")
    with pytest.raises(UsageError, match="leave --worker"):
        begin("tcp://two:7000", workers_file=path)
    with pytest.raises(UsageError, match="--privacy tee has no workers"):
        begin(workers_file=path, privacy="tee", pad_memory=None)
    with pytest.raises(UsageError, match="Cannot read"):
        begin(workers_file=tmp_path / "none")
    with pytest.raises(UsageError, match="is not encrypted"):
        begin(workers_file=write(path, "tcp://one:7000", "tcp://two:7000"), privacy="shares")
