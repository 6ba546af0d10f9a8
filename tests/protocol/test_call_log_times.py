"""The times of a call log add up, and name what a run waits for: whole runs, real workers."""

import secrets
import time
from pathlib import Path
from typing import Any

import pytest
from call_logs import greedy, read
from protocol_helpers import SHARED
from slow_workers import MODEL, busy_neighbour, slow_link, slow_worker
from torch import manual_seed
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp import LLM
from tsqp.gpu.worker import PRIVATE_ABILITIES
from tsqp.report.methods import LogReport
from tsqp.report.phases import call_parts_us, phases_of
from tsqp.tee.call_lines import CallLine
from tsqp.tee.stats import KINDS
from tsqp.wire.channel import InprocChannel
from tsqp.wire.messages import Hello


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, wide enough that a call takes longer than what Python does around it."""
    folder = tmp_path_factory.mktemp("small")
    manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=1152,
        intermediate_size=3072,
        num_hidden_layers=3,
        num_attention_heads=18,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("privacy", [pytest.param("open", marks=pytest.mark.slow), "pad"])
def test_what_is_measured_adds_up_to_the_wall_time(
    privacy: str, small: Path, tmp_path: Path
) -> None:
    # Somebody else's work may fall between two stages: once in so many times it should not.
    assert any(_share_left(privacy, small, tmp_path / f"log-{i}") < 0.05 for i in range(10))


def _share_left(privacy: str, small: Path, path: Path) -> float:
    """How much of a phase one of two clocks leaves open, at most; all else about it checked."""
    options = {"privacy": privacy, "dtype": "float32", "timeout": 60, "pad_memory": 2**25}
    with LLM(str(small), worker="local", rpc_log=path, **options) as llm:
        llm.fill_pads()
        began = time.perf_counter()
        llm.generate([list(range(1, 201))], greedy(24))
        wall_s = time.perf_counter() - began
    log = read(path)
    phases = phases_of(log)
    assert [phase.phase for phase in phases] == ["prefill", "decode"]
    total_s = 0.0
    for phase in phases:
        calls = [call for call in log.calls if call.phase == phase.phase]
        calls_s = sum(sum(call_parts_us(call)) for call in calls) / 1e6
        kinds_s = phase.seconds(*KINDS)  # those that were no calls
        # Nobody measured what is left, so it must be little; a stage counted twice is too much.
        left_s = phase.wall_s - calls_s - kinds_s
        assert 0 <= left_s == pytest.approx(phase.seconds("joining rows", "other"), abs=1e-3)
        assert phase.seconds("worker compute") > 0
        total_s += sum(phase.parts_s.values())
    assert total_s == pytest.approx(wall_s, rel=0.05)
    # What the calls leave of the clocks around them, and what those leave of the wall time.
    return max(
        phase.seconds(part) / phase.wall_s for phase in phases for part in ("joining rows", "other")
    )


def test_laps_of_calls_do_not_overlap(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LLM(str(small), worker="local", dtype="float32", timeout=60, rpc_log=path) as llm:
        llm.generate([list(range(1, 401))], greedy(2))  # four blocks of rows a call
    log = read(path)
    spans = sorted(
        (call.time * 1e6, call.time * 1e6 + sum(call_parts_us(call)) + call.away_us, call)
        for call in log.calls
    )
    first, last = spans[0][0], max(end for _, end, _ in spans)
    assert sum(sum(call_parts_us(call)) for _, _, call in spans) < last - first
    assert any(call.away_us > call.wait_us for call in log.calls)


def bottlenecks(path: Path) -> dict[str, str]:
    return {found.phase: found.name for found in LogReport.of(read(path)).bottlenecks}


def test_a_worker_that_computes_slowly_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with (
        slow_worker(f"ipc://{tmp_path}/sock", lambda rows: 0.05) as endpoint,
        LLM(MODEL, worker=endpoint, timeout=60, rpc_log=path) as llm,
    ):
        llm.generate([[1, 2, 3]], greedy(2))
        assert llm.transport == SHARED
    assert bottlenecks(path) == {"prefill": "worker compute", "decode": "worker compute"}


@pytest.mark.slow
def test_a_slow_link_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with (
        slow_worker("tcp://127.0.0.1:0", lambda rows: 0.0) as endpoint,
        slow_link(endpoint, 0.05) as link,
        LLM(MODEL, worker=link, shm=False, timeout=60, rpc_log=path) as llm,
    ):
        llm.generate([[1, 2, 3]], greedy(2))
        assert llm.transport == "inline"
    assert bottlenecks(path) == {"prefill": "link", "decode": "link"}


@pytest.mark.parametrize("shm", [True, False], ids=[SHARED, "inline"])
def test_calls_of_others_that_a_worker_does_first_count_as_link(shm: bool, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with (
        slow_worker(f"ipc://{tmp_path}/sock", lambda rows: 0.001 * rows) as endpoint,
        LLM(MODEL, worker=endpoint, shm=shm, timeout=60, rpc_log=path) as llm,
    ):
        digest = llm._workers[0].channel.welcome.weights_digest  # type: ignore[union-attr]
        shm_bytes = 2**20 if shm else 0
        hello = Hello(secrets.token_bytes(32), digest, "int8", PRIVATE_ABILITIES, shm_bytes)
        with busy_neighbour(endpoint, hello, rows=30):
            llm.generate([[1, 2]], greedy(4))
    assert bottlenecks(path) == {"prefill": "link", "decode": "link"}


def test_a_worker_cannot_claim_more_than_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = InprocChannel.wait

    def boasting(channel: InprocChannel, *ticket: Any) -> Any:
        reply = wait(channel, *ticket)
        assert reply.times is not None
        reply.times.compute_ns = 2**62
        return reply

    monkeypatch.setattr(InprocChannel, "wait", boasting)
    path = tmp_path / "log"
    with LLM(MODEL, worker="inproc", rpc_log=path) as llm:
        llm.generate([[1, 2, 3]], greedy(3))
    calls: list[CallLine] = list(read(path).calls)
    assert calls
    for call in calls:
        assert call.compute_us <= call.wait_us + 0.1
        assert call.overlap_us <= call.away_us


def test_a_log_of_tee_alone_has_no_calls(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with LLM(MODEL, privacy="tee", rpc_log=path) as llm:
        llm.generate([[1, 2, 3]], greedy(3))
    log = read(path)
    assert log.calls == []
    assert bottlenecks(path) == {"prefill": "TEE own work", "decode": "TEE own work"}
