"""The non-linear operations. They run on the trusted side, unless a trusted GPU runs whole layers.

Shape suffixes: T tokens; D features; I inner features; H query heads; J key/value heads; N heads
of either sort; K features of one head, and h = K/2; S tokens in the cache.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.model.config import Llama3Scaling

ATTENTION_BLOCK = 256  # query rows that attend at once; larger wastes work above the diagonal


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, rounded once to x's dtype."""
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) · up, [T, F/2], where the first half of F is the gate."""
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> Tensor:
    """Radians per position of each rotated pair, float32 [K/2].

    With `scaling`, Llama 3.1's: long waves are slowed by `factor`, short ones kept, and those in
    between interpolated. The order of operations is that of transformers, to the last bit.
    """
    exponents_h = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency_h = 1.0 / theta**exponents_h
    if scaling is None:
        return frequency_h
    original = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength_h = 2 * math.pi / frequency_h
    slowed_h = frequency_h / scaling.factor
    smooth_h = (original / wavelength_h - low) / (high - low)
    between_h = (1 - smooth_h) * frequency_h / scaling.factor + smooth_h * frequency_h
    scaled_h = torch.where(wavelength_h < original / high, frequency_h, between_h)
    return torch.where(wavelength_h > original / low, slowed_h, scaled_h)


def rope_tables(
    positions_T: Tensor, frequency_h: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos [T, 1, 1, h] and (-sin, sin) [T, 1, 2, h] of each position, for `rope`."""
    angle_Th = positions_T[:, None].float() * frequency_h
    cos_Th, sin_Th = angle_Th.cos().to(dtype), angle_Th.sin().to(dtype)
    return cos_Th[:, None, None], torch.stack((-sin_Th, sin_Th), dim=1)[:, None]


def rope(x_TNK: Tensor, cos_T11h: Tensor, sin_T12h: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of every head, as Hugging Face checkpoints have them."""
    x_TN2h = x_TNK.view(*x_TNK.shape[:-1], 2, -1)
    return torch.addcmul(x_TN2h * cos_T11h, x_TN2h.flip(-2), sin_T12h).flatten(-2)


def attention(q_THK: Tensor, k_JSK: Tensor, v_JSK: Tensor) -> list[Tensor]:
    """Causal softmax attention of one sequence's last T tokens over all its S tokens.

    Query head h reads key/value head h // (H/J). The rows come in fixed blocks, counted from the
    first, so that their numbers depend on nothing but this sequence.

    Returns:
        the rows of y_TD, D = H·K, as blocks to be concatenated.
    """
    rows, length = q_THK.shape[0], k_JSK.shape[1]
    if rows == 1:
        # The query heads of a group become the rows of their one key/value head: no mask, and
        # each key is read once.
        q_1JGK = q_THK.view(1, k_JSK.shape[0], -1, q_THK.shape[2])
        y_1JGK = F.scaled_dot_product_attention(q_1JGK, k_JSK[None], v_JSK[None])
        return [y_1JGK.reshape(1, -1)]
    past = length - rows
    return [
        _attend_block(q_THK[first:end], k_JSK[:, : past + end], v_JSK[:, : past + end])
        for first in range(0, rows, ATTENTION_BLOCK)
        for end in [min(first + ATTENTION_BLOCK, rows)]
    ]


def _attend_block(q_BHK: Tensor, k_JSK: Tensor, v_JSK: Tensor) -> Tensor:
    rows, length = q_BHK.shape[0], k_JSK.shape[1]
    # SDPA's own causal mask is aligned to the first key; this one to the last.
    mask_BS = q_BHK.new_full((rows, length), -math.inf).triu_(length - rows + 1)
    y_1HBK = F.scaled_dot_product_attention(
        q_BHK.transpose(0, 1)[None],
        k_JSK[None],
        v_JSK[None],
        attn_mask=mask_BS,
        enable_gqa=q_BHK.shape[1] != k_JSK.shape[0],
    )
    return y_1HBK[0].transpose(0, 1).reshape(rows, -1)
