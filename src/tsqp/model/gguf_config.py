"""A `ModelConfig` from the metadata of a GGUF file.

The metadata is spelled as a Hugging Face config and checked as one, so there is one set of rules.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import ModelConfig, from_hf
from tsqp.model.files import check_shape
from tsqp.model.gguf_reader import GGUFHeader
from tsqp.model.gguf_rope import llama3_scaling

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FREQS = "rope_freqs.weight"

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
}
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_config(header: GGUFHeader, rope_freqs: Tensor | None) -> ModelConfig:
    """Check the metadata of a file of the "llama" architecture.

    Args:
        rope_freqs: the tensor "rope_freqs.weight", float32, if the file has one.

    Raises:
        UnsupportedModel: another architecture, or an option that is not implemented.
        CheckpointError: a key is missing, has the wrong type, or lies out of bounds.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"The GGUF file has the architecture {str(architecture)[:40]!a}, and TSQP supports"
            " llama."
        )
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"The GGUF file lacks tensor {EMBEDDING}.")
    for key in _REQUIRED.values():
        if f"llama.{key}" not in metadata:
            raise CheckpointError(f"The GGUF file has no llama.{key}.")
    spelled = {hf: metadata.get(f"llama.{key}") for hf, key in (_REQUIRED | _OPTIONAL).items()}
    embedding = header.tensors[EMBEDDING]
    config = from_hf(
        spelled
        | {
            "model_type": "llama",
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": HEAD not in header.tensors,
            "attention_bias": _has_bias(header, ".attn_"),
            "mlp_bias": _has_bias(header, ".ffn_"),
            "rope_scaling": _rope_scaling(metadata),
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": [metadata.get(f"tokenizer.ggml.{key}") for key in _END_TOKENS],
            "dtype": {"F16": "float16", "BF16": "bfloat16"}.get(embedding.encoding.name, "float32"),
        },
        None,
    )
    _check_options(metadata, config)
    if rope_freqs is None:
        return config
    check_shape("the GGUF file", ROPE_FREQS, tuple(rope_freqs.shape), (config.head_dim // 2,))
    scaling = llama3_scaling(rope_freqs, config.rope_theta, config.head_dim)
    return replace(config, rope_scaling=scaling)


def _has_bias(header: GGUFHeader, kind: str) -> bool:
    return any(kind in name and name.endswith(".bias") for name in header.tensors)


def _rope_scaling(metadata: dict[str, Any]) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type")
    return None if kind in (None, "none") else {"rope_type": kind}


def _check_options(metadata: dict[str, Any], config: ModelConfig) -> None:
    """Refuse what would silently compute something else."""
    only: dict[str, object] = {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.scale_linear": 1,
        "expert_count": 0,
    }
    for key, supported in only.items():
        found = metadata.get(f"llama.{key}", supported)
        if found != supported:
            raise UnsupportedModel(
                f"The GGUF file has llama.{key} {str(found)[:40]}, and TSQP supports"
                f" {supported} here."
            )
