"""Small models, and what the writers of checkpoints need to know."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tsqp.model.config import ModelConfig, linear_groups
from tsqp.model.linear_group import LinearGroup

WriteGGUF = Callable[..., Path]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_model(**changes: object) -> LlamaForCausalLM:
    """Grouped queries, biases, and heads that do not fill the hidden size."""
    settings: dict[str, object] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are constant at first
            parameter.copy_(torch.randn_like(parameter))
    return model


def group_of(config: ModelConfig, layer: int | None, name: str) -> LinearGroup:
    """The group of a model at this place."""
    [found] = [g for g in linear_groups(config) if (g.layer, g.name) == (layer, name)]
    return found


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def rope_freqs(config: LlamaConfig) -> np.ndarray:
    """By what transformers divides each rotary frequency of a llama3 model."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta, head_dim = config.rope_parameters["rope_theta"], config.head_dim
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float().numpy()
