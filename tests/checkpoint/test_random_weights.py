"""Random weights are the same everywhere, and look like weights."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tsqp.bench.hf_model import hf_config
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import tensor_shapes
from tsqp.model.hf_config import from_hf

UP = "model.layers.0.mlp.up_proj.weight"


def test_the_weights_of_a_name_never_change() -> None:
    found = weights_digest(open_checkpoint("random:tiny"), torch.float32)
    assert found == "77cdd997676d695ba89d5788a67e2854d660716d2827c929c7d9400cb2046543"


def test_the_values_are_what_the_docstring_says() -> None:
    seed = hashlib.sha256(f"tiny/5/{UP}".encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(128 * 64 // 4)
    digits = [(int(word) >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    expected = (np.array(digits) - 32767.5) * 0.02 * np.sqrt(12 / (2**32 - 1))
    found = open_checkpoint("random:tiny:5").read(UP, (128, 64))
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=2e-7)


def test_a_tensor_larger_than_a_chunk_is_one_stream() -> None:
    found = open_checkpoint("random:smollm2-135m").read(
        "model.layers.0.mlp.up_proj.weight", (1536, 576)
    )
    assert found.unique().numel() > 65_000  # no chunk is repeated or left empty
    halves = found.flatten()[: 2 * 2**18].view(2, -1)
    assert not torch.equal(halves[0], halves[1])


def test_weights_have_mean_0_and_standard_deviation_0_02() -> None:
    found = open_checkpoint("random:smollm2-135m").read("model.embed_tokens.weight", (49_152, 576))
    deviation = 0.02 / found.numel() ** 0.5
    assert abs(found.double().mean().item()) < 5 * deviation
    assert found.double().std().item() == pytest.approx(0.02, rel=1e-3)
    assert found.max() == -found.min()


def test_norms_are_near_1() -> None:
    found = open_checkpoint("random:tiny").read("model.norm.weight", (64,))
    assert 0 < (found - 1).abs().max() < 0.04


def test_seeds_and_names_give_different_weights() -> None:
    shape = (128, 64)
    tensors = [
        open_checkpoint("random:tiny:1").read(UP, shape),
        open_checkpoint("random:tiny:2").read(UP, shape),
        open_checkpoint("random:tiny:1").read(UP.replace("up", "gate"), shape),
    ]
    assert not torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])


def test_the_seed_is_0_unless_given() -> None:
    assert open_checkpoint("random:tiny").name == open_checkpoint("random:tiny:0").name


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_has_the_parameters_its_name_claims(name: str) -> None:
    claimed = {
        "tiny": 139_584,
        "smollm2-135m": 134_515_008,
        "tinyllama-1.1b": 1_100_048_384,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "qwen2.5-0.5b": 494_032_768,
        "qwen3-0.6b": 596_049_920,
        "gemma-3-270m": 268_098_176,
    }
    shapes = tensor_shapes(GEOMETRIES[name]).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == claimed[name]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_is_one_that_transformers_accepts(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(GEOMETRIES[name]))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = tensor_shapes(GEOMETRIES[name])
    assert ours | {"lm_head.weight": theirs["lm_head.weight"]} == theirs


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_is_what_the_config_of_transformers_says(name: str) -> None:
    ours = GEOMETRIES[name]
    assert from_hf(hf_config(ours).to_dict(), None) == replace(ours, dtype="float32")


def test_an_unknown_geometry_is_named_with_the_choices() -> None:
    with pytest.raises(UnsupportedModel, match=r"no such random model.*tiny"):
        open_checkpoint("random:gpt-5")


@pytest.mark.parametrize("seed", ["", "x", "-1", "1:2", "٣", str(2**64)])
def test_a_seed_that_is_no_number_is_refused(seed: str) -> None:
    with pytest.raises(CheckpointError, match="seed"):
        open_checkpoint(f"random:tiny:{seed}")


def test_a_tensor_or_shape_of_another_model_is_refused() -> None:
    checkpoint = open_checkpoint("random:tiny")
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.read("model.layers.2.mlp.up_proj.weight", (128, 64))
    with pytest.raises(CheckpointError, match=r"\[128, 64\].*\[64, 128\]"):
        checkpoint.read(UP, (64, 128))
