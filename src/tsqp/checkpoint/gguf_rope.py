"""Finds the parameters of llama3 rotary scaling; GGUF files hold only the resulting factors."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tsqp.errors import UnsupportedModel
from tsqp.model.config import Layer, ModelConfig
from tsqp.model.rope import Llama3Scaling

# Only original_max_positions / low_freq_factor and / high_freq_factor enter the factors, so they
# cannot be told apart; these are the values of every released Llama 3 model.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_MAX_POSITIONS = 1.0, 4.0, 8192


def with_scaling(config: ModelConfig, factors: Tensor) -> ModelConfig:
    """The config with the llama3 scaling that gives `factors`, [head_dim / 2].

    Raises:
        UnsupportedModel: no llama3 scaling gives these factors.
    """

    def scaled(layer: Layer) -> Layer:
        if layer.rope is None:
            return layer
        scaling = llama3_scaling(factors, layer.rope.theta, config.head_dim)
        return replace(layer, rope=replace(layer.rope, scaling=scaling))

    return replace(config, layers=tuple(scaled(layer) for layer in config.layers))


def llama3_scaling(factors: Tensor, rope_theta: float, head_dim: int) -> Llama3Scaling | None:
    """The scaling that divides rotary frequency i by `factors[i]`; None if all are 1.

    Args:
        factors: float, [head_dim / 2].

    Raises:
        UnsupportedModel: no llama3 scaling gives these factors.
    """
    factor = float(factors.max())
    if bool((factors == 1).all()):
        return None
    if 1 <= factor <= 1e6:
        scaling = Llama3Scaling(factor, LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_MAX_POSITIONS)
        expected = _factors(scaling, rope_theta, head_dim)
        if torch.allclose(factors.double(), expected, rtol=1e-4, atol=0):
            return scaling
    raise UnsupportedModel(
        "The GGUF file's rope_freqs.weight is not the rotary scaling of a Llama 3 model, the only"
        " kind that TSQP supports."
    )


def _factors(scaling: Llama3Scaling, rope_theta: float, head_dim: int) -> Tensor:
    """The factors as llama.cpp's converter writes them; float64, [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = scaling.original_max_positions * rope_theta**-exponents / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)
