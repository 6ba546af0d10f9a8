"""Configs as they are published, and configs that cannot be right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import (
    FAMILIES,
    FULL,
    SLIDING,
    WINDOW,
    logits_in_chunks,
    make_model,
    random_ids,
    reference_logits,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from published_configs import GEMMA_3_4B, PUBLISHED
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

from tsqp import LLM
from tsqp.bench.baseline import Transformers
from tsqp.bench.hf_model import hf_config
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import CheckpointError, ModelError, TokenizerError, UnsupportedModel
from tsqp.model.config import Layer, tensor_shapes
from tsqp.model.hf_config import from_hf
from tsqp.model.rope import LinearScaling, Rope
from tsqp.tee.decoder import Decoder
from tsqp.tee.offload.local import LocalOffload


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_what_transformers_makes_of_it(name: str) -> None:
    raw = PUBLISHED[name]
    filled = AutoConfig.for_model(**json.loads(json.dumps(raw))).to_dict()
    generation = {"eos_token_id": 2}
    filled["bos_token_id"] = None
    assert from_hf(filled, generation) == from_hf(raw, generation)


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_config_spelled_for_transformers_is_read_as_itself(name: str) -> None:
    ours = from_hf(PUBLISHED[name], None)
    positions = PUBLISHED[name]["max_position_embeddings"]
    spelled = hf_config(ours, max_position_embeddings=positions).to_dict()
    assert from_hf(spelled, None) == ours


def test_the_text_part_of_a_model_that_sees_images_is_read() -> None:
    config = from_hf(GEMMA_3_4B, None)
    local, full = Layer(1024, Rope(10_000.0)), Layer(None, Rope(1_000_000.0, LinearScaling(8.0)))
    assert config.layers == ((local,) * 5 + (full,)) * 5 + (local,) * 4
    assert (config.vocab_size, config.num_heads, config.num_kv_heads) == (262_208, 8, 4)
    assert (config.model_type, config.dtype) == ("gemma3_text", "bfloat16")
    assert config.eos_token_ids == (1, 106)
    assert config.tie_word_embeddings


def test_a_checkpoint_that_sees_images_too_gives_the_logits_of_its_language_model(
    tmp_path: Path,
) -> None:
    text = make_model("gemma3", final_logit_softcapping=None).config
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    decoder, offload = Decoder(checkpoint, torch.float32), LocalOffload(checkpoint, torch.float32)
    ids = random_ids(40)
    found = logits_in_chunks(decoder, offload, ids, [40])
    torch.testing.assert_close(found, reference_logits(model, ids), atol=1e-4, rtol=0)
    checkpoint.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tensors_are_those_of_transformers(name: str) -> None:
    model = make_model(name)
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ours = tensor_shapes(from_hf(model.config.to_dict(), None))
    assert ours | {"lm_head.weight": theirs["lm_head.weight"]} == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_contradicts_the_tensors_is_refused_with_both_shapes(
    name: str, tmp_path: Path
) -> None:
    write_model(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"self_attn.*_proj.*\[\d+, 48\].*asks for \[\d+, 48"):
        LocalOffload(checkpoint, torch.float32)
    checkpoint.close()


def test_norms_of_another_head_size_are_refused_with_both_shapes(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 8}))
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"q_norm.*\[16\].*\[8\]"):
        Decoder(checkpoint, torch.float32)
    checkpoint.close()


def test_a_family_whose_tensors_are_missing_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "mistral")
    config = json.loads((tmp_path / "config.json").read_text())
    changed = config | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"lacks tensor.*q_norm"):
        Decoder(checkpoint, torch.float32)
    checkpoint.close()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen2", {"layer_types": [FULL]}, "layer_types.*list of 4"),
        ("qwen2", {"layer_types": 7}, "layer_types 7"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": False, "layer_types": [SLIDING] * 4}, "no sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers.*list of 4"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "interval 0"),
        ("granite", {"logits_scaling": 0}, "logits_scaling 0"),
        ("granite", {"attention_multiplier": "x"}, "attention_multiplier 'x'"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.*sliding"),
        ("gemma3", {"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping -1.0"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        from_hf(make_model(name).config.to_dict() | changes, None)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'.*sliding"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ("phi3", {"rope_parameters": {"type": "longrope"}}, "'longrope'"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "Phi-3"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor"),
        ("granite", {"architectures": ["GraniteMoeForCausalLM"]}, "GraniteForCausalLM"),
    ],
)
def test_what_is_not_implemented_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        from_hf(make_model(name).config.to_dict() | changes, None)


def test_a_wrapper_without_a_language_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="text_config"):
        from_hf({"model_type": "gemma3"}, None)


def test_layer_types_decide_where_a_mistral_has_windows() -> None:
    config = make_model("mistral").config.to_dict() | {"layer_types": [FULL, SLIDING] * 2}
    assert [layer.window for layer in from_hf(config, None).layers] == [None, WINDOW] * 2


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"attention_bias": False}, r"self_attn\.[qkvo]_proj\.bias"),
        ("granite", {"mlp_bias": False}, r"mlp\.(gate|up|down)_proj\.bias"),
        ("smollm3", {"num_hidden_layers": 3, "layer_types": [FULL] * 3}, r"layers\.3\."),
        ("qwen3", {"model_type": "llama", "architectures": None}, r"self_attn\.[qk]_norm"),
        ("gemma2", {"model_type": "mistral", "architectures": None}, "feedforward_layernorm"),
    ],
)
def test_tensors_that_the_config_leaves_out_are_refused_by_name(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_model(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=rf"holds tensor 'model\..*{words}"):
        open_checkpoint(str(tmp_path))


def test_frequencies_that_old_checkpoints_hold_are_passed_over(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    decoder, offload = Decoder(checkpoint, torch.float32), LocalOffload(checkpoint, torch.float32)
    ids = random_ids(20)
    found = logits_in_chunks(decoder, offload, ids, [20])
    torch.testing.assert_close(found, reference_logits(model, ids), atol=1e-4, rtol=0)
    checkpoint.close()


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    with (
        LLM(str(tmp_path), privacy="tee") as llm,
        pytest.raises(TokenizerError, match=r"no tokenizer that can be read.*--prompt-ids"),
    ):
        llm.generate(["a prompt"])


VALUES = st.sampled_from(
    [None, True, 0, 1, -1, 3, 0.5, 1e300, float("nan"), "x", [], [1, 0], [FULL], {}, {"a": {}}]
) | st.dictionaries(
    st.sampled_from(["rope_type", "factor", FULL, SLIDING, "rope_theta", "beta_fast"]),
    st.sampled_from([None, 0, 2.0, "yarn", "dynamic", "linear", {}, {"rope_type": "yarn"}]),
)
CONFIGS = [*PUBLISHED.values(), GEMMA_3_4B, GEMMA_3_4B["text_config"]]
KEYS = sorted({key for config in CONFIGS for key in config} | {"rope_parameters", "layer_types"})


@given(
    base=st.sampled_from(CONFIGS),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
)
def test_a_mutated_config_raises_nothing_but_model_errors(
    base: dict[str, Any], changes: dict[str, Any]
) -> None:
    try:
        config = from_hf(base | changes, None)
    except ModelError as error:
        assert len(str(error)) < 400
    else:
        assert config.num_layers == len(config.layers) > 0


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite"])
def test_the_baseline_of_benchmarks_runs_the_same_model(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, name)
    checkpoint = open_checkpoint(str(tmp_path))
    baseline = Transformers(checkpoint, torch.float32)
    ids = random_ids(40)
    baseline.prefill([ids])
    expected = reference_logits(model, ids)[-1]
    torch.testing.assert_close(baseline._out.logits[0, -1], expected, atol=1e-4, rtol=0)
    checkpoint.close()
