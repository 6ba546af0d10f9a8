"""A `ModelConfig` from the metadata of a GGUF file.

The metadata is converted to a Hugging Face config and checked as one, so there is one set of rules.
"""

from typing import Any

from torch import Tensor

from tsqp.checkpoint.files import check_shape
from tsqp.checkpoint.gguf_end_tokens import end_token_ids
from tsqp.checkpoint.gguf_reader import GGUFHeader
from tsqp.checkpoint.gguf_rope import with_scaling
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import ModelConfig
from tsqp.model.families import FULL, SLIDING
from tsqp.model.hf_config import from_hf
from tsqp.model.json_fields import show

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FREQS = "rope_freqs.weight"

# GGUF architecture: Hugging Face model type.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}

# Hugging Face key: GGUF key without the architecture's prefix.
_REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_SCALING = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_SPELLED_ELSEWHERE = {
    "attention.sliding_window_pattern",
    "rope.scaling.finetuned",  # says where the scaling comes from, and changes no number
}

# The largest of each, by their layers, scale attention by hidden_size / heads, and no file says so.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def read_config(header: GGUFHeader, rope_freqs: Tensor | None) -> ModelConfig:
    """Check the metadata of a file.

    Args:
        rope_freqs: the tensor "rope_freqs.weight", float32, if the file has one.

    Raises:
        UnsupportedModel: an architecture or an option that is not implemented.
        CheckpointError: a key is missing, has the wrong type, or lies out of bounds.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"The GGUF file has the architecture {show(architecture)}, but TSQP supports"
            f" {', '.join(ARCHITECTURES)}."
        )
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"The GGUF file lacks tensor {EMBEDDING}.")
    start = f"{architecture}."
    own = {
        key.removeprefix(start): value
        for key, value in header.metadata.items()
        if key.startswith(start)
    }
    for key in _REQUIRED.values():
        if key not in own:
            raise CheckpointError(f"The GGUF file has no {start}{key}.")
    config = from_hf(_spelled(architecture, own) | _of_file(header), None)
    _check_options(start, own, config)
    if rope_freqs is None:
        return config
    check_shape("the GGUF file", ROPE_FREQS, tuple(rope_freqs.shape), (config.head_dim // 2,))
    return with_scaling(config, rope_freqs)


def _spelled(architecture: str, own: dict[str, Any]) -> dict[str, Any]:
    """The architecture's own metadata under Hugging Face's names; missing keys get defaults."""
    found = {hf: own.get(key) for hf, key in (_REQUIRED | _OPTIONAL).items()}
    spelled = {key: value for key, value in found.items() if value is not None}
    spelled |= {"model_type": ARCHITECTURES[architecture], "rope_scaling": _rope_scaling(own)}
    if architecture == "phi3" and not spelled.get("sliding_window"):
        spelled["sliding_window"] = None
    pattern = own.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        spelled["layer_types"] = [SLIDING if slides else FULL for slides in pattern]
    elif pattern is not None:
        spelled["sliding_window_pattern"] = pattern
    heads, hidden = spelled["num_attention_heads"], spelled["hidden_size"]
    spelled.setdefault("num_key_value_heads", heads)
    is_27b = spelled["num_hidden_layers"] == _GEMMA_27B.get(architecture)
    if is_27b and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        spelled["query_pre_attn_scalar"] = hidden / heads
    return spelled


def _of_file(header: GGUFHeader) -> dict[str, Any]:
    """Values from the tensors and the tokenizer, under Hugging Face's names."""
    embedding = header.tensors[EMBEDDING]
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": HEAD not in header.tensors,
        "attention_bias": _has_bias(header, ".attn_"),
        "mlp_bias": _has_bias(header, ".ffn_"),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_token_ids(header),
        "dtype": {"F16": "float16", "BF16": "bfloat16"}.get(embedding.encoding.name, "float32"),
    }


def _has_bias(header: GGUFHeader, kind: str) -> bool:
    return any(kind in name and name.endswith(".bias") for name in header.tensors)


def _rope_scaling(own: dict[str, Any]) -> dict[str, Any] | None:
    if own.get("rope.scaling.type") in (None, "none"):
        return None
    return {hf: own.get(key) for hf, key in _SCALING.items()}


def _check_options(start: str, own: dict[str, Any], config: ModelConfig) -> None:
    """Refuse options that would silently change the computation."""
    only: dict[str, object] = {
        "attention.causal": True,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.dimension_count_swa": config.head_dim,
        "rope.scale_linear": 1,
        "rope.scaling.attn_factor": 1,
        "rope.scaling.yarn_log_multiplier": 0,
        "expert_count": 0,
    }
    for key, supported in only.items():
        found = own.get(key, supported)
        if found != supported:
            raise UnsupportedModel(
                f"The GGUF file has {start}{key} {show(found)}, but TSQP supports {supported} here."
            )
    known = {*_REQUIRED.values(), *_OPTIONAL.values(), *_SCALING.values(), *_SPELLED_ELSEWHERE}
    for key in sorted(own.keys() - known - only.keys()):
        if key.startswith(("attention.", "rope.")):
            raise UnsupportedModel(
                f"The GGUF file has the option {show(start + key)}, which TSQP does not support."
            )
