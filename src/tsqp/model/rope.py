"""Rotary position embeddings: their variants, and the frequencies of each.

Each variant is computed in the order of operations of transformers' ROPE_INIT_FUNCTIONS, so that
frequencies agree to the last bit. Shape suffix: h = K/2 for heads of K features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK-aware: theta grows with a sequence that is longer than `original_max_positions`."""

    factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): long waves are slowed by `factor`, short ones kept.

    Attributes:
        attention_factor: by which cosines and sines are multiplied.
        beta_fast, beta_slow: turns within the original context that bound what is in between.
        truncate: whether those bounds are rounded to whole features.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Parameters of the "llama3" rotary scaling (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"The model config has high_freq_factor {self.high_freq_factor}, which must be"
                f" greater than low_freq_factor {self.low_freq_factor}."
            )


Scaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True, slots=True)
class Rope:
    """How the queries and keys of a layer are rotated; `scaling` is None for the plain variant."""

    theta: float
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """By which cosines and sines are multiplied."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    def max_positions(self, configured: int) -> int:
        """The longest context, in tokens, of a model whose config says `configured`.

        Two variants may exceed it: dynamic scaling changes nothing up to that length, and YaRN is
        often switched on only by its own parameters.
        """
        if isinstance(self.scaling, DynamicScaling):
            return int(configured * self.scaling.factor)
        if isinstance(self.scaling, YarnScaling):
            return max(configured, int(self.scaling.original_max_positions * self.scaling.factor))
        return configured


def frequencies(rope: Rope, head_dim: int, length: int = 0) -> Tensor:
    """Radians per position of each rotated pair, float32 [h].

    Args:
        length: tokens of the sequence so far, which dynamic scaling depends on: beyond the
            original context the frequencies are those of the whole length, computed anew at each
            step. As in transformers, keys that are in the cache stay as they were rotated.
    """
    exponents_h = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    match rope.scaling:
        case None:
            return _plain(rope.theta, exponents_h)
        case LinearScaling(factor):
            return _plain(rope.theta, exponents_h) / factor
        case DynamicScaling() as dynamic:
            theta = _dynamic_theta(rope.theta, dynamic, head_dim, length)
            return _plain(theta, exponents_h)
        case YarnScaling() as yarn:
            return _yarn(rope.theta, yarn, head_dim, exponents_h)
        case Llama3Scaling() as llama3:
            return _llama3(_plain(rope.theta, exponents_h), llama3)


def _plain(theta: float | Tensor, exponents_h: Tensor) -> Tensor:
    frequency_h: Tensor = 1.0 / theta**exponents_h
    return frequency_h


def _dynamic_theta(
    theta: float, scaling: DynamicScaling, head_dim: int, length: int
) -> float | Tensor:
    original, factor = scaling.original_max_positions, scaling.factor
    # transformers takes a longer length from a tensor, and so computes with it in float32.
    longer: int | Tensor = torch.tensor(length) if length > original else original
    grown: float | Tensor = (factor * longer / original) - (factor - 1)
    return theta * grown ** (head_dim / (head_dim - 2))


def _yarn(theta: float, scaling: YarnScaling, head_dim: int, exponents_h: Tensor) -> Tensor:
    def feature(turns: float) -> float:
        """The feature that makes this many turns within the original context."""
        longest = scaling.original_max_positions / (turns * 2 * math.pi)
        return (head_dim * math.log(longest)) / (2 * math.log(theta))

    low, high = feature(scaling.beta_fast), feature(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if high == low:
        high += 0.001
    period_h = theta**exponents_h
    slowed_h, kept_h = 1.0 / (scaling.factor * period_h), 1.0 / period_h
    ramp_h = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep_h = 1 - ramp_h.clamp(0, 1)
    return slowed_h * (1 - keep_h) + kept_h * keep_h


def _llama3(frequency_h: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those in between interpolated."""
    original = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength_h = 2 * math.pi / frequency_h
    slowed_h = frequency_h / scaling.factor
    smooth_h = (original / wavelength_h - low) / (high - low)
    between_h = (1 - smooth_h) * frequency_h / scaling.factor + smooth_h * frequency_h
    scaled_h = torch.where(wavelength_h < original / high, frequency_h, between_h)
    return torch.where(wavelength_h > original / low, slowed_h, scaled_h)
