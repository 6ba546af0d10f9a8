"""`--rpc-log`: what is in the file, what is not, and what it does not disturb."""

import itertools
import json
import resource
import secrets
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from call_logs import greedy, read
from protocol_helpers import Main
from slow_workers import MODEL

from tsqp import LLM
from tsqp.errors import RemoteError, UsageError
from tsqp.gpu.worker import Worker
from tsqp.report.phases import call_parts_us
from tsqp.report.read import LogFile, read_file
from tsqp.runtime.worker_sessions import WorkerSessions
from tsqp.tee.call_lines import Phase, Stage
from tsqp.wire.channel import InprocChannel

TIMES = {f"{stage}_us" for stage in get_args(Stage)} | {"away_us", "overlap_us"}
COUNTS = {"step", "layer", "endpoint", "rows", "sent_bytes", "received_bytes"}
WORDS = {
    "line": {"call"},
    "phase": set(get_args(Phase)),
    "method": {"embed", "linear", "product", "seed_product"},
    "group": {"qkv", "o", "gate_up", "down", "lm_head"},
    "transport": {"poll", "shm", "inline", "inproc"},
}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("privacy", ["open", "pad", "shares"])
def test_two_prompts_of_a_length_leave_the_same_log_but_for_times(
    privacy: str, tmp_path: Path
) -> None:
    kept = []
    for number in range(2):
        path = tmp_path / f"{number}"
        worker = ["inproc"] * (2 if privacy == "shares" else 1)
        prompt = [secrets.randbelow(500) for _ in range(150)]
        with LLM(
            MODEL, privacy=privacy, worker=worker, rpc_log=path, insecure_same_host=True
        ) as llm:
            [answer] = llm.generate([prompt], greedy(5))
        assert len(answer.token_ids) == 5
        calls = lines_of(path)[1:-1]
        assert len(calls) > 5 * 9
        for call in calls:
            assert set(call) == TIMES | COUNTS | set(WORDS) | {"time"}
            assert all(call[name] in words for name, words in WORDS.items() if call[name])
            assert all(isinstance(call[name], float) for name in TIMES)
        kept.append(
            [{n: v for n, v in call.items() if n not in TIMES | {"time"}} for call in calls]
        )
    assert kept[0] == kept[1]


def test_the_header_and_the_summary_have_no_place_for_content(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        llm.generate([list(range(400, 440))], greedy(3))
    header, *calls, summary = lines_of(path)
    assert set(header) == {
        "line", "format", "tsqp", "privacy", "field", "dtype", "model", "geometry", "transport",
        "threads", "microbatches", "prefill_chunk", "start", "machine",
    }  # fmt: skip
    assert header["model"] == MODEL
    assert set(header["machine"]) == {"cpu", "simd", "python", "torch", "tsqp", "date"}
    assert set(summary) == {"line", "prefill", "decode", "calls", "dropped"}
    assert (summary["calls"], summary["dropped"]) == (len(calls), 0)
    assert (summary["prefill"]["tokens"], summary["decode"]["tokens"]) == (40, 2)
    for phase in ("prefill", "decode"):
        for stage, seconds in summary[phase]["stages_s"].items():
            lines = [call[f"{stage}_us"] for call in calls if call["phase"] == phase]
            assert sum(lines) / 1e6 == pytest.approx(seconds, abs=1e-7 * len(lines))


def test_a_log_holds_no_text_of_the_prompt_and_no_path(
    main: Main, speaking: Path, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    result = main(
        "generate", speaking, "--worker", "inproc", "--prompt", "the unspeakable secret",
        "--max-tokens", 8, "--rpc-log", path, "--json",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    text = path.read_text()
    assert "unspeakable" not in text
    assert result.json["outputs"][0]["text"] not in text
    assert str(tmp_path) not in text
    assert speaking.name not in text
    assert json.loads(text.splitlines()[0])["model"].startswith("weights ")


def test_a_log_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LLM(MODEL, privacy="tee", rpc_log=path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_exists_is_kept(main: Main, ids: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("precious")
    command = ["generate", MODEL, "--privacy", "tee", "--prompt-ids", ids, "--rpc-log", path]
    result = main(*command)
    assert result.status == 2
    assert result.error == f"{path} exists; name a new file for --rpc-log."
    assert path.read_text() == "precious"


def test_a_model_that_cannot_be_loaded_leaves_no_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with pytest.raises(UsageError, match="No such file"):
        LLM(MODEL, privacy="tee", rpc_log=tmp_path / "missing" / "log")
    with pytest.raises(Exception, match="no such random model"):
        LLM("random:nowhere", privacy="tee", rpc_log=path)
    assert not path.exists()


def test_without_a_log_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = []
    reserve = InprocChannel.reserve

    def noted(channel: InprocChannel, *call: Any) -> Any:
        slots.append(reserve(channel, *call))
        return slots[-1]

    monkeypatch.setattr(InprocChannel, "reserve", noted)
    with LLM(MODEL, worker="inproc") as llm:
        llm.generate([[1, 2, 3]], greedy(2))
    assert slots
    assert all(slot.times is None for slot in slots)


def test_a_run_that_fails_keeps_what_was_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    run = Worker.run

    def failing(worker: Worker, *call: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise ValueError("out of order")
        run(worker, *call)

    monkeypatch.setattr(Worker, "run", failing)
    path = tmp_path / "log"
    with pytest.raises(RemoteError), LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        llm.generate([[1, 2, 3]], greedy(10))
    log = read(path)
    assert len(log.calls) == 29
    assert {call.phase for call in log.calls} == {"prefill", "decode"}


def test_calls_of_a_step_that_fails_are_not_those_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    run = Worker.run

    def failing(worker: Worker, *call: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 14:  # the fifth of nine in the second step
            raise ValueError("out of order")
        run(worker, *call)

    monkeypatch.setattr(Worker, "run", failing)
    path = tmp_path / "log"
    with LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        with pytest.raises(RemoteError):
            llm.generate([[1, 2, 3]], greedy(10))
        llm.generate([[1, 2, 3]], greedy(1))
    log = read(path)
    steps = Counter((call.step, call.phase) for call in log.calls)
    assert steps == {(1, "prefill"): 9, (2, "decode"): 4, (3, "prefill"): 9}
    assert log.summary is not None
    assert (log.summary.decode.steps, log.summary.decode.tokens) == (1, 0)
    assert log.summary.decode.wall_s > sum(
        sum(call_parts_us(call)) / 1e6 for call in log.calls if call.phase == "decode"
    )


def test_calls_between_steps_are_not_those_of_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        llm.score([1, 2, 3])
        llm.generate([[1, 2, 3]], greedy(1))
    steps = Counter((call.step, call.phase) for call in read(path).calls)
    assert steps == {(0, "other"): 9, (1, "prefill"): 9}


def test_a_processor_clock_that_goes_back_leaves_a_log_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = itertools.count(0, -0.01)
    monkeypatch.setattr(WorkerSessions, "cpu_s", lambda sessions: next(readings))
    path = tmp_path / "log"
    with LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        llm.generate([[1, 2, 3]], greedy(2))
        assert llm.stats.tee_cpu_s == 0
    log = read_file(path)
    assert isinstance(log, LogFile)
    assert log.summary is not None
    assert not log.notes


@pytest.mark.fresh
def test_the_trusted_process_starts_no_program_for_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*command: Any, **options: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with LLM(MODEL, privacy="tee", rpc_log=tmp_path / "log") as llm:
        llm.generate([[1, 2, 3]], greedy(1))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


def test_a_full_disk_stops_the_log_and_not_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    with LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        with full_disk(20_000):
            [answer] = llm.generate([[1, 2, 3]], greedy(20))
        assert len(answer.token_ids) == 20
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([w for w in warnings if "the call log stops here" in w]) == 1
    log = read_file(path)
    assert isinstance(log, LogFile)
    assert log.summary is not None
    assert log.summary.calls == 20 * 9
    assert 0 < len(log.calls) == 20 * 9 - log.summary.dropped
    assert f"lacks {log.summary.dropped:,} lines" in log.notes[0]
