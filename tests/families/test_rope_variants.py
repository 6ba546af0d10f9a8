"""Every variant of rotary embeddings is that of transformers, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import logits_in_chunks, random_ids, reference_logits, write_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tsqp import LLM
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.hf_config import from_hf
from tsqp.model.rope import Rope, frequencies
from tsqp.tee.decoder import Decoder
from tsqp.tee.offload.local import LocalOffload

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn with an attention factor": YARN | {"attention_factor": 0.7},
    "yarn with mscale": YARN | {"mscale": 0.9, "mscale_all_dim": 0.4},
    "yarn with betas": YARN | {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn not truncated": YARN | {"truncate": False},
    "yarn with its original length elsewhere": {"rope_type": "yarn", "factor": 2.0},
    "llama3": LLAMA3,
}


def llama(rope: dict[str, Any], head_dim: int = 64, theta: float = 10_000.0) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        rope_parameters=rope | {"rope_theta": theta},
    )


def rope_of(config: dict[str, Any]) -> Rope:
    rope = from_hf(config, None).layers[0].rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10_000.0), (128, 1e6), (16, 500.0)])
def test_frequencies_and_attention_factor_are_those_of_transformers(
    variant: str, head_dim: int, theta: float
) -> None:
    theirs = LlamaRotaryEmbedding(llama(VARIANTS[variant], head_dim, theta))
    ours = rope_of(llama(VARIANTS[variant], head_dim, theta).to_dict())
    assert torch.equal(frequencies(ours, head_dim), theirs.inv_freq)
    assert ours.attention_factor == theirs.attention_scaling


@pytest.mark.parametrize("length", [1, 256, 257, 300, 611])
def test_dynamic_frequencies_follow_the_length(length: int) -> None:
    config = llama(VARIANTS["dynamic"])
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        config, torch.device("cpu"), seq_len=torch.tensor(length)
    )
    ours = frequencies(rope_of(config.to_dict()), 64, length)
    if length > 256:
        assert torch.equal(ours, expected)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_old_spelling_means_the_same(variant: str) -> None:
    rope = VARIANTS[variant]
    new = llama(rope, theta=5e5).to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": rope | {"type": rope["rope_type"]}}
    del old["rope_scaling"]["rope_type"]
    assert from_hf(old, None) == from_hf(new, None)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dynamic"])
def test_models_with_each_variant_give_the_logits_of_transformers(
    variant: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, "llama", rope_parameters=VARIANTS[variant] | {"rope_theta": 1e4})
    ids = random_ids(100)
    expected = reference_logits(model, ids)
    for chunks in ([100], [90, *[1] * 10]):
        found = logits_of(tmp_path, ids, chunks)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


SPLITS: dict[str, dict[str, str]] = {
    "attention tee": {},
    "attention gpu": {"attention": "gpu"},
    "fuse layer": {"fuse": "layer"},
}


@pytest.mark.parametrize("variant", ["linear", "yarn with an attention factor", "llama3"])
def test_each_variant_is_the_same_in_every_mode(variant: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama", rope_parameters=VARIANTS[variant] | {"rope_theta": 1e4})
    ids = random_ids(100)
    expected = reference_logits(model, ids)
    for split in SPLITS.values():
        found = logits_of_llm(tmp_path, ids, privacy="open", worker="inproc", **split)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    padded = logits_of_llm(tmp_path, ids, privacy="pad", worker="inproc", pad_memory=0)
    assert torch.equal(padded, logits_of_llm(tmp_path, ids, privacy="tee", fixed_point=True))


def logits_of_llm(folder: Path, ids: list[int], **options: Any) -> torch.Tensor:
    with LLM(str(folder), dtype="float32", **options) as llm:
        assert llm._offload is not None
        return logits_in_chunks(llm._engine._runner._decoder, llm._offload, ids, [90, *[1] * 10])


@pytest.mark.parametrize("chunks", [[100], [40, 40, 20], [30, *[1] * 70]])
def test_dynamic_scaling_gives_the_logits_of_transformers_in_the_same_steps(
    chunks: list[int], tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = write_model(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=32)
    ids = random_ids(100)
    cache, pieces, start = None, [], 0
    with torch.no_grad():
        for length in chunks:
            out = model(torch.tensor([ids[start : start + length]]), past_key_values=cache)
            cache, start = out.past_key_values, start + length
            pieces.append(out.logits[0])
    found = logits_of(tmp_path, ids, chunks)
    torch.testing.assert_close(found, torch.cat(pieces), atol=1e-4, rtol=0)


def logits_of(folder: Path, ids: list[int], chunks: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(str(folder))
    decoder, offload = Decoder(checkpoint, torch.float32), LocalOffload(checkpoint, torch.float32)
    found = logits_in_chunks(decoder, offload, ids, chunks)
    checkpoint.close()
    return found


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 1024),
        (YARN, 256),
        (YARN | {"factor": 16.0}, 1024),
        (LLAMA3, 256),
    ],
)
def test_the_longest_context_is_what_the_config_allows(
    rope: dict[str, Any], positions: int
) -> None:
    assert from_hf(llama(rope).to_dict(), None).max_positions == positions


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear"}, "no factor"),
        ({"rope_type": "dynamic", "factor": 0.5}, "factor 0.5.*between"),
        (YARN | {"beta_fast": -1.0}, "beta_fast"),
        (YARN | {"attention_factor": "high"}, "attention_factor 'high'.*number"),
        (YARN | {"truncate": 1}, "truncate"),
        (LLAMA3 | {"high_freq_factor": 0.5}, "high_freq_factor"),
    ],
)
def test_a_wrong_parameter_is_named(rope: dict[str, Any], words: str) -> None:
    config = llama({"rope_type": "default"}).to_dict() | {"rope_parameters": rope}
    with pytest.raises(CheckpointError, match=words):
        from_hf(config, None)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "su"}, "'su'.*default, linear, dynamic, yarn, llama3"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "'full_attention'"),
    ],
)
def test_a_variant_that_is_not_implemented_is_named(rope: dict[str, Any], words: str) -> None:
    config = llama({"rope_type": "default"}).to_dict() | {"rope_parameters": rope}
    with pytest.raises(UnsupportedModel, match=words):
        from_hf(config, None)


def test_two_features_a_head_have_no_dynamic_scaling() -> None:
    config = llama({"rope_type": "default"}, head_dim=2).to_dict()
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(CheckpointError, match="head_dim 2"):
        from_hf(config, None)
