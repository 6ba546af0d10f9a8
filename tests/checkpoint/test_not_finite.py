"""Numbers that are not finite are refused by name when they are loaded, on both sides."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from model_helpers import WriteGGUF, make_model
from tsqp import LLM
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.errors import CheckpointError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker_weights import load_integers, load_weights

CPU = CpuBackend()
TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.layers.1.post_attention_layernorm.weight",
    "final norm": "model.norm.weight",
    "bias": "model.layers.1.mlp.down_proj.bias",
    "weight": "model.layers.0.self_attn.k_proj.weight",
    "head": "lm_head.weight",
}
VALUES = (math.nan, math.inf, -math.inf)
MODES: dict[str, dict[str, Any]] = {
    "tee": {"privacy": "tee"},
    "fixed point": {"privacy": "tee", "fixed_point": True},
    "pad": {"privacy": "pad", "worker": "inproc"},
    "open": {"privacy": "open", "worker": "inproc"},
}


def damage(folder: Path, name: str, value: float) -> None:
    """Change the last number of one tensor."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[-1] = value
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(name)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", TENSORS)
def test_every_mode_refuses_it_by_name(what: str, mode: str, sharded: Path) -> None:
    number = list(TENSORS).index(what) + list(MODES).index(mode)
    damage(sharded, TENSORS[what], VALUES[number % len(VALUES)])
    with pytest.raises(CheckpointError, match=rf"{TENSORS[what]} of .* holds NaN or infinity"):
        LLM(str(sharded), **MODES[mode])


def worker_of_open(checkpoint: Checkpoint) -> object:
    return load_weights(checkpoint, torch.bfloat16, CPU)


def worker_of_private_modes(checkpoint: Checkpoint) -> object:
    return load_integers(checkpoint, CPU)


@pytest.mark.parametrize(
    ("load", "names"),
    [
        (worker_of_open, list(TENSORS)),
        (worker_of_private_modes, ["weight", "head"]),  # all it has
    ],
)
def test_a_worker_refuses_it_by_name(
    load: Callable[[Checkpoint], object], names: list[str], directory: Path
) -> None:
    for what in names:
        before = load_file(directory / "model.safetensors")
        damage(directory, TENSORS[what], math.nan)
        with pytest.raises(CheckpointError, match=rf"{TENSORS[what]} of .* holds NaN"):
            load(open_checkpoint(str(directory)))
        save_file(before, directory / "model.safetensors", metadata={"format": "pt"})
    load(open_checkpoint(str(directory)))


@pytest.mark.parametrize("what", TENSORS)
def test_it_is_refused_in_a_gguf_file(what: str, write_gguf: WriteGGUF) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(TENSORS[what]).view(-1)[-1] = math.nan
    checkpoint = open_checkpoint(str(write_gguf(model)))
    with pytest.raises(CheckpointError, match=rf"{TENSORS[what]} of .* holds NaN"):
        weights_digest(checkpoint, torch.float32)


def test_it_is_refused_where_a_quantised_block_has_an_infinite_scale(
    model: Any, write_gguf: WriteGGUF
) -> None:
    path = write_gguf(model, quantization=GGMLQuantizationType.Q8_0)
    encoding = GGMLQuantizationType.Q8_0
    values = model.state_dict()[TENSORS["weight"]].numpy()
    raw = path.read_bytes()
    block = gguf.quantize(values[:1], encoding).tobytes()  # a half-width scale, then integers
    assert raw.count(block) == 1
    path.write_bytes(raw.replace(block, np.float16(np.inf).tobytes() + block[2:]))
    with pytest.raises(CheckpointError, match=r"k_proj.* holds NaN or infinity"):
        weights_digest(open_checkpoint(str(path)), torch.float32)


def test_what_is_too_large_for_the_dtype_of_a_run_is_named_with_it(directory: Path) -> None:
    damage(directory, TENSORS["embedding"], 7e4)
    with LLM(str(directory), privacy="tee"):
        pass
    with pytest.raises(CheckpointError, match=r"too large for float16: use another --dtype"):
        LLM(str(directory), privacy="tee", dtype="float16")
