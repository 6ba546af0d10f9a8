"""`open --attention gpu` and `open --fuse layer` over real worker processes."""

import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from protocol_helpers import DEADLINE_S, SHARED, Commands, eventually

from tsqp import LLM, SamplingParams
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import HandshakeError
from tsqp.gpu import worker as gpu_worker
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker_weights import load_weights
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.server import Server

PROMPTS = [list(range(1, 90)), [7], list(range(300, 250, -1))]
PROMPTS += [[n, 2 * n] for n in range(20, 50)]  # whose spans do not fit in a posted message
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SPLITS = {"attention": {"attention": "gpu"}, "layer": {"fuse": "layer"}}


def answers(**options: object) -> list[tuple[int, ...]]:
    with LLM("random:tiny", prefill_chunk=64, **options) as llm:  # type: ignore[arg-type]
        return [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    found = answers(privacy="tee")
    assert len({token for answer in found for token in answer}) > 10
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shm", [True, False], ids=[SHARED, "inline"])
def test_a_worker_process_gives_the_tokens_of_tee(
    split: str, shm: bool, tiny_worker: str, expected: list[tuple[int, ...]]
) -> None:
    options = {"privacy": "open", "worker": tiny_worker, "shm": shm, **SPLITS[split]}
    assert answers(**options) == expected
    assert answers(**options, microbatches=2) == expected


PLACES = {
    "embedding": "worker",
    "linear": "worker",
    "qk_product": "worker",
    "softmax": "TEE",
    "pv_product": "worker",
    "rms_norm": "TEE",
    "rotary": "TEE",
    "activation": "TEE",
    "sampling": "TEE",
}
TIMERS = {
    "softmax": "softmax",
    "rms_norm": "norm",
    "rotary": "rope",
    "activation": "activation",
    "sampling": "sampling",
}


def test_with_attention_on_the_gpu_each_side_runs_what_it_did_in_the_prototype(
    commands: Commands, tiny_worker: str, ids: Path
) -> None:
    result = commands.run(
        "generate", "random:tiny", "--privacy", "open", "--worker", tiny_worker,
        "--attention", "gpu", "--prompt-ids", ids, "--max-tokens", 3, "--ignore-eos", "--json",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    found = result.json
    assert found["placement"] == PLACES
    # What was placed in the TEE was timed there, and what was not the worker was asked for.
    ran = found["operations"]
    assert {timer for name, timer in TIMERS.items() if PLACES[name] == "TEE"} <= set(ran)
    assert set(ran) - set(TIMERS.values()) == {"embedding", "linear", "attention"}
    layers, forwards = 2, 3
    assert found["rpc"]["calls_by_kind"] == {
        "allocate": 1,
        "embed": forwards,
        "linear": forwards * (3 * layers + 1),
        "attention_scores": forwards * layers,
        "weighted_values": forwards * layers,
        "free": 1,
    }
    [worker] = [line for line in result.stderr.splitlines() if line.startswith("worker  ")]
    assert worker.split(maxsplit=1)[1].strip() == "embedding, linear layers, Q·Kᵀ, P·V"


@pytest.mark.parametrize("privacy", ["tee", "pad", "open"])
def test_the_placement_of_other_modes_is_what_the_worker_is_asked_for(privacy: str) -> None:
    worker = None if privacy == "tee" else "inproc"
    with LLM("random:tiny", privacy=privacy, worker=worker) as llm:
        llm.generate([[1, 2, 3]], GREEDY)
        placement, asked, ran = llm.placement, set(llm.rpc.calls), llm.stats.as_dict()
    assert (placement.embedding == "worker") == ("embed" in asked)
    assert (placement.linear == "worker") == bool(asked & {"linear", "product"})
    assert asked <= {"embed", "linear", "product"}
    assert isinstance(ran["operations"], dict)
    assert {"attention", "norm", "rope", "activation", "sampling"} <= set(ran["operations"])
    assert {placement.qk_product, placement.softmax, placement.rms_norm} == {"TEE"}


def test_with_whole_layers_on_the_worker_the_trusted_side_norms_once_and_samples() -> None:
    with LLM("random:tiny", privacy="open", worker="inproc", fuse="layer") as llm:
        llm.generate([[1, 2, 3]], GREEDY)
        placement, calls = asdict(llm.placement), llm.rpc.calls
        ran = llm.stats.as_dict()["operations"]
    assert placement == dict.fromkeys(PLACES, "worker") | {"rms_norm": "both", "sampling": "TEE"}
    assert isinstance(ran, dict)
    assert set(ran) == {"embedding", "layer", "linear", "norm", "sampling"}
    forwards, layers = 12, 2
    assert [ran[kind]["calls"] for kind in ("norm", "layer")] == [forwards, forwards * layers]
    assert calls == {
        "allocate": 1,
        "embed": forwards,
        "layer": forwards * layers,
        "linear": forwards,  # the output projection
        "free": 1,
    }


@pytest.mark.parametrize("split", SPLITS)
def test_a_worker_that_lacks_the_ability_is_refused(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_worker, "SPLIT_ABILITIES", ())
    with pytest.raises(HandshakeError, match=f"the worker cannot do {split}; install the same"):
        LLM("random:tiny", privacy="open", worker="inproc", **SPLITS[split])


@pytest.mark.parametrize("split", SPLITS)
def test_a_client_that_is_killed_gives_its_memory_back(
    split: str, speaking: Path, commands: Commands
) -> None:
    checkpoint = open_checkpoint(str(speaking))
    worker = gpu_worker.Worker(load_weights(checkpoint, torch.float32, CpuBackend()))
    assert worker._store is not None
    cache, stop = worker._store.cache, threading.Event()
    server = Server(parse_endpoint(commands.ipc()))
    thread = threading.Thread(target=server.serve, args=(worker, stop.is_set))
    thread.start()
    try:
        options = [f"--{name}={value}" for name, value in SPLITS[split].items()]
        client = commands.start(
            "generate", speaking, "--privacy", "open", "--worker", commands.ipc(), *options,
            "--dtype", "float32", "--prompt", "Once", "--max-tokens", 90_000, "--ignore-eos",
        )  # fmt: skip
        client.answers()
        assert cache.reserved_bytes > 0
        client.stop()
        assert eventually(lambda: cache.reserved_bytes == 0)
    finally:
        stop.set()
        thread.join(DEADLINE_S)
        server.close()
        checkpoint.close()
    assert not thread.is_alive()
