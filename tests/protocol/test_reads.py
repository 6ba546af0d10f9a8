"""The trusted side reads what it uses once: what it computes with is what it hashed."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp import LLM, SamplingParams
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.safetensors_file import SafetensorsCheckpoint
from tsqp.gpu.worker import Worker
from tsqp.runtime.worker_link import WorkerProcess

EMBEDDING = "model.embed_tokens.weight"
TWO_TOKENS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def save_model(folder: Path, *, tied: bool) -> set[str]:
    """A tiny model with every kind of bias; the names of its tensors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return set(model.state_dict()) - ({"lm_head.weight"} if tied else set())


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the trusted side read each tensor from a file."""
    names: Counter[str] = Counter()
    read, make_worker = SafetensorsCheckpoint.read, WorkerProcess._inproc_worker

    def counted(
        self: SafetensorsCheckpoint, name: str, shape: tuple[int, ...], rows: slice | None = None
    ) -> torch.Tensor:
        names[name] += rows is None or rows.start == 0  # tensors are read from their first row on
        return read(self, name, shape, rows)

    def worker(self: WorkerProcess, checkpoint: Checkpoint) -> Worker:
        before = Counter(names)
        made = make_worker(self, checkpoint)
        names.clear()
        names.update(before)
        return made

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counted)
    monkeypatch.setattr(WorkerProcess, "_inproc_worker", worker)
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    return names


MODES = pytest.mark.parametrize(
    "options",
    [
        {"privacy": "open", "worker": "inproc"},
        {"privacy": "pad", "worker": "inproc"},
        {"privacy": "shares", "worker": ["inproc", "inproc"], "insecure_same_host": True},
        {"privacy": "tee", "fixed_point": True},
        {"privacy": "tee"},
    ],
    ids=["open", "pad", "shares", "fixed-point", "tee"],
)


@MODES
def test_every_tensor_is_read_once(
    options: dict[str, Any], reads: Counter[str], tmp_path: Path
) -> None:
    names = save_model(tmp_path / "model", tied=False)
    with LLM(str(tmp_path / "model"), **options) as llm:
        llm.generate([[1, 2, 3]], TWO_TOKENS)
    assert reads == dict.fromkeys(names, 1)


@pytest.mark.parametrize("privacy", ["pad", "open"])
def test_a_tied_table_is_read_again_only_to_be_quantised(
    privacy: str, reads: Counter[str], tmp_path: Path
) -> None:
    names = save_model(tmp_path / "model", tied=True)
    with LLM(str(tmp_path / "model"), privacy=privacy, worker="inproc"):
        pass
    twice = {EMBEDDING: 2} if privacy == "pad" else {}
    assert reads == dict.fromkeys(names, 1) | twice


def test_from_the_cache_only_what_is_no_integer_is_read(
    reads: Counter[str], tmp_path: Path
) -> None:
    names = save_model(tmp_path / "model", tied=True)
    for _ in range(2):
        reads.clear()
        with LLM(str(tmp_path / "model"), privacy="pad", worker="inproc"):
            pass
    integers = {name for name in names if name.endswith("_proj.weight")}
    assert reads == dict.fromkeys(names - integers, 1)
