"""The most memory that each side ever has, on a real model: docs/memory.md."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import processes
from tsqp.checkpoint import demo_model
from tsqp.checkpoint.footprint import trusted_bytes, worker_bytes
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.errors import CheckpointError

MIB = 2**20
TRANSIENT = 64 * MIB  # stated in docs/memory.md

# Of SmolLM2-135M: everything is a linear weight or the embedding, which are one, but 0.03 %.
PARAMETERS = 134_515_008
EMBEDDING = 49_152 * 576
# With lattice masks: outputs of all groups, and inputs of the widest; the integers of the output
# projection, which are as many as the embedding has numbers, while they pass.
OUTPUTS, INPUTS = 30 * (960 + 576 + 3072 + 576) + 49_152, 30 * (3 * 576 + 1536) + 576
HINTS = 6 * 2048 * (OUTPUTS + 1536)
CHECKS = 20 * (OUTPUTS + INPUTS)

PROGRAM = """
import json, sys
from tsqp import LLM, SamplingParams
from tsqp.bench.startup import peak_bytes
from tsqp.tee.text.tokenizer import Tokenizer

model, options = sys.argv[1], json.loads(sys.argv[2])
none = Tokenizer("random:tiny")  # a tokenizer is no weight
with LLM(model, tokenizer=none, dtype="float32", threads=2, prefill_chunk=32, **options) as llm:
    llm.generate([[1] * 32], SamplingParams(0, max_tokens=2, ignore_eos=True))
    local = [worker._local for worker in llm._workers if worker._local is not None]
    workers = [peak_bytes(worker._process.pid) for worker in local]
    print(json.dumps([peak_bytes(), *workers]))
"""

MODES: dict[str, tuple[dict[str, object], list[int]]] = {
    "tee": ({"privacy": "tee"}, [4 * PARAMETERS]),
    "pad": (
        {"privacy": "pad", "worker": "local", "pad_memory": 0},
        [PARAMETERS + 4 * EMBEDDING, PARAMETERS],
    ),
    "lattice": (
        {"privacy": "pad", "worker": "local", "pad_memory": 0, "field": "lattice"},
        [HINTS + CHECKS + 4 * EMBEDDING + EMBEDDING, PARAMETERS],
    ),
    "open": ({"privacy": "open", "worker": "local"}, [0, 4 * PARAMETERS]),
}


def peaks(model: str, options: dict[str, object], cache: Path) -> list[int]:
    """Of the trusted side, and of its worker if there is one."""
    process = processes.start(
        [sys.executable, "-c", PROGRAM, model, json.dumps(options)],
        env=os.environ | {"TSQP_CACHE": str(cache)},
        stdout=processes.PIPE,
    )
    with process:
        assert process.stdout is not None
        found: list[int] = json.loads(process.stdout.read())
    return found


@pytest.fixture
def demo_file() -> str:
    try:
        return str(demo_model.locate())
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=[pytest.mark.slow] if m != "pad" else []) for m in MODES]
)
def test_no_side_ever_holds_much_more_than_its_weights(
    mode: str, demo_file: str, tmp_path: Path
) -> None:
    options, kept = MODES[mode]
    base = peaks("random:tiny", options, tmp_path)
    found = peaks(demo_file, options, tmp_path)
    assert len(found) == len(base) == len(kept)
    for before, peak, weights in zip(base, found, kept, strict=True):
        assert 0.95 * weights < peak - before < weights + TRANSIENT


@pytest.mark.parametrize("mode", MODES)
def test_the_formula_gives_the_weights_of_a_real_model(mode: str) -> None:
    _, kept = MODES[mode]
    config = GEOMETRIES["smollm2-135m"]
    lattice = mode == "lattice"
    privacy = "pad" if lattice else mode
    serve = "private" if privacy == "pad" else "open"
    found = [
        trusted_bytes(config, torch.float32, privacy, lattice=lattice),
        worker_bytes(config, torch.float32, serve),
    ]
    for bytes_found, expected in zip(found, kept, strict=False):
        assert bytes_found == pytest.approx(expected, rel=0.02)
