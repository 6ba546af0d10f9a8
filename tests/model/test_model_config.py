"""A hostile config.json gives a ModelConfig or one clear refusal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from model_helpers import LLAMA3_ROPE, make_model
from tsqp.errors import CheckpointError, ModelError, UnsupportedModel
from tsqp.model.config import (
    Layer,
    ModelConfig,
    output_projection,
    tensor_shapes,
)
from tsqp.model.hf_config import from_hf
from tsqp.model.rope import Llama3Scaling, Rope

LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}

LLAMA_1_7B: dict[str, Any] = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}


def rope_of(config: ModelConfig) -> Rope:
    """That of all layers."""
    (rope,) = {layer.rope for layer in config.layers}
    assert rope is not None
    return rope


def test_the_old_spelling_is_understood() -> None:
    config = from_hf(LLAMA_32_1B, None)
    rope = Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    assert config.layers == (Layer(None, rope),) * 16
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.tie_word_embeddings


def test_both_spellings_mean_the_same() -> None:
    new = {k: v for k, v in LLAMA_32_1B.items() if k not in ("rope_theta", "rope_scaling")}
    new["dtype"] = new.pop("torch_dtype")
    new["rope_parameters"] = LLAMA_32_1B["rope_scaling"] | {"rope_theta": 500_000.0}
    assert from_hf(new, None) == from_hf(LLAMA_32_1B, None)


def test_what_transformers_writes_is_understood() -> None:
    theirs = LlamaConfig(rope_parameters=dict(LLAMA3_ROPE), dtype="float16", head_dim=96)
    ours = from_hf(theirs.to_dict(), None)
    assert rope_of(ours).scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert ours.head_dim == 96
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.dtype == "float16"


def test_llama_1_has_as_many_kv_heads_as_heads_and_splits_the_hidden_size() -> None:
    config = from_hf(LLAMA_1_7B, None)
    assert (config.num_kv_heads, config.head_dim) == (32, 128)
    assert rope_of(config) == Rope(10_000.0)
    assert config.eos_token_ids == (1,)


def test_the_generation_config_decides_what_ends_an_answer() -> None:
    assert from_hf(LLAMA_1_7B, {"eos_token_id": [7, 8, 7]}).eos_token_ids == (7, 8)
    assert from_hf(LLAMA_1_7B, {"eos_token_id": None}).eos_token_ids == ()
    assert from_hf(LLAMA_1_7B, {}).eos_token_ids == ()
    assert from_hf(LLAMA_1_7B, None).eos_token_ids == (1,)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    config = {k: v for k, v in LLAMA_32_1B.items() if k != key}
    with pytest.raises(CheckpointError, match=f"no {key}"):
        from_hf(config, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "128256"),
        ("vocab_size", True),
        ("hidden_size", 2048.0),
        ("hidden_size", -1),
        ("num_hidden_layers", 10**30),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 63),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("rope_scaling", 7),
        ("tie_word_embeddings", 1),
        ("attention_bias", "false"),
        ("bos_token_id", 128256),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", -5),
        ("architectures", "LlamaForCausalLM"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        from_hf(LLAMA_32_1B | {key: value}, None)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_a_missing_scaling_parameter_is_named(key: str) -> None:
    scaling = {k: v for k, v in LLAMA_32_1B["rope_scaling"].items() if k != key}
    with pytest.raises(CheckpointError, match=f"no {key}"):
        from_hf(LLAMA_32_1B | {"rope_scaling": scaling}, None)


def test_scaling_bands_in_the_wrong_order_are_refused() -> None:
    scaling = LLAMA_32_1B["rope_scaling"] | {"low_freq_factor": 4.0}
    with pytest.raises(CheckpointError, match="high_freq_factor"):
        from_hf(LLAMA_32_1B | {"rope_scaling": scaling}, None)


def test_heads_must_split_the_hidden_size_where_no_head_dim_is_given() -> None:
    with pytest.raises(CheckpointError, match="hidden_size 4097"):
        from_hf(LLAMA_1_7B | {"hidden_size": 4097}, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "mamba"},
            "'mamba'.*llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "Sequence.*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "'gelu'.*silu"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'.*linear.*yarn, llama3"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "int8"}, "'int8'.*bfloat16"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_what_is_not_implemented_is_named_with_the_alternatives(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        from_hf(LLAMA_32_1B | changes, None)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**5000), 10**5000)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["llama3", "default", "silu", "llama"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["factor", "type"]), inner)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*LLAMA_32_1B, "rope_parameters", "dtype", "quantization_config"])


@given(
    base=st.sampled_from([LLAMA_32_1B, LLAMA_1_7B]),
    changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=4),
    generation=st.none() | st.dictionaries(st.just("eos_token_id"), JSON),
)
def test_a_mutated_config_raises_nothing_but_model_errors(
    base: dict[str, Any], changes: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    try:
        config = from_hf(base | changes, generation)
    except ModelError as error:
        assert len(str(error)) < 400
    else:
        assert config.num_heads % config.num_kv_heads == 0


def test_the_parts_are_the_linear_layers_of_transformers() -> None:
    model = make_model()
    config = from_hf(model.config.to_dict(), None)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(config) == theirs


def test_a_tied_output_projection_is_the_embedding() -> None:
    (part,) = output_projection(from_hf(LLAMA_32_1B, None)).parts
    assert (part.name, part.out_features) == ("model.embed_tokens", 128256)
