"""The non-linear operations. They run in the TEE, unless a trusted GPU runs whole layers.

Shape suffixes: T tokens; D features; I inner features; H query heads; J key/value heads; N heads
of either sort; K features of one head, and h = K/2; S tokens in the cache.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ATTENTION_BLOCK = 256  # query rows that attend at once; larger wastes work above the diagonal


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, rounded once to x's dtype.

    A weight of another dtype than x is applied in its own.
    """
    return F.rms_norm(x_TD.to(weight_D.dtype), weight_D.shape, weight_D, eps).to(x_TD.dtype)


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) · up, [T, F/2], where the first half of F is the gate."""
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


def gelu_tanh_mul(gate_up_TF: Tensor) -> Tensor:
    """gelu(gate) · up, with the tanh approximation of gelu; the halves as in `silu_mul`."""
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    return F.gelu(gate_TI, approximate="tanh").mul_(up_TI)


GATED = {"silu": silu_mul, "gelu_tanh": gelu_tanh_mul}


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap), which lies between -cap and cap."""
    return (x / cap).tanh_().mul_(cap)


def rope_tables(
    positions_T: Tensor,
    frequency_h: Tensor,
    dtype: torch.dtype,
    attention_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """cos [T, 1, 1, h] and (-sin, sin) [T, 1, 2, h] of each position, for `rope`.

    Args:
        frequency_h: or [T, h], if tokens have frequencies of their own.
    """
    angle_Th = positions_T[:, None].float() * frequency_h
    cos_Th = (angle_Th.cos() * attention_factor).to(dtype)
    sin_Th = (angle_Th.sin() * attention_factor).to(dtype)
    return cos_Th[:, None, None], torch.stack((-sin_Th, sin_Th), dim=1)[:, None]


def rope(x_TNK: Tensor, cos_T11h: Tensor, sin_T12h: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of every head, as Hugging Face checkpoints have them."""
    x_TN2h = x_TNK.view(*x_TNK.shape[:-1], 2, -1)
    return torch.addcmul(x_TN2h * cos_T11h, x_TN2h.flip(-2), sin_T12h).flatten(-2)


def attention(
    q_THK: Tensor,
    k_JSK: Tensor,
    v_JSK: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> list[Tensor]:
    """Causal softmax attention of one sequence's last T tokens over all its S tokens.

    Query head h reads key/value head h // (H/J). Rows are computed in fixed blocks, counted from
    the first, so that the results depend only on this sequence.

    Args:
        scale: of q·k; 1/√K if None.
        window: number of tokens that each token attends to, including itself; None for all before.
        softcap: bound of the scores, see `soft_cap`.

    Returns:
        the rows of y_TD, D = H·K, as blocks to be concatenated.
    """
    past = k_JSK.shape[1] - q_THK.shape[0]
    blocks = []
    for first in range(0, q_THK.shape[0], ATTENTION_BLOCK):
        end = min(first + ATTENTION_BLOCK, q_THK.shape[0])
        oldest = 0 if window is None else max(0, past + first + 1 - window)
        seen = slice(oldest, past + end)
        blocks.append(
            _attend(q_THK[first:end], k_JSK[:, seen], v_JSK[:, seen], scale, window, softcap)
        )
    return blocks


def _attend(
    q_BHK: Tensor,
    k_JSK: Tensor,
    v_JSK: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One block: its rows are the last of the S tokens, which none attends to before its window."""
    rows, length = q_BHK.shape[0], k_JSK.shape[1]
    mask_BS = None if rows == 1 else _mask(q_BHK, length, window)
    if softcap is not None:
        return _attend_capped(q_BHK, k_JSK, v_JSK, scale, mask_BS, softcap)
    if rows == 1:
        # The query heads of a group become the rows of their one key/value head: no mask, and
        # each key is read once.
        q_1JGK = q_BHK.view(1, k_JSK.shape[0], -1, q_BHK.shape[2])
        y_1JGK = F.scaled_dot_product_attention(q_1JGK, k_JSK[None], v_JSK[None], scale=scale)
        return y_1JGK.reshape(1, -1)
    y_1HBK = F.scaled_dot_product_attention(
        q_BHK.transpose(0, 1)[None],
        k_JSK[None],
        v_JSK[None],
        attn_mask=mask_BS,
        scale=scale,
        enable_gqa=q_BHK.shape[1] != k_JSK.shape[0],
    )
    return y_1HBK[0].transpose(0, 1).reshape(rows, -1)


def attention_weights(
    scores_HTS: Tensor,
    positions_T: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The softmax of `attention`, of scores that are neither scaled nor masked.

    Computed in float32, rounded once to the scores' dtype, in fresh memory.

    Args:
        scores_HTS: one sequence's queries with its keys from the first on.
        positions_T: int64, the position of each query in its sequence.
    """
    keys_S = torch.arange(scores_HTS.shape[2])
    hidden_TS = keys_S > positions_T[:, None]
    if window is not None:
        hidden_TS |= keys_S <= positions_T[:, None] - window
    scaled_HTS = scores_HTS.float() * scale
    if softcap is not None:
        scaled_HTS = soft_cap(scaled_HTS, softcap)
    return scaled_HTS.masked_fill_(hidden_TS, -math.inf).softmax(-1).to(scores_HTS.dtype)


def _mask(q_BHK: Tensor, length: int, window: int | None) -> Tensor:
    """0 if a row attends, -inf elsewhere, [B, S]; SDPA's own is aligned to the first key."""
    rows = q_BHK.shape[0]
    hidden_BS = q_BHK.new_full((rows, length), -math.inf)
    mask_BS = hidden_BS.triu(length - rows + 1)
    return mask_BS if window is None else mask_BS + hidden_BS.tril_(length - rows - window)


def _attend_capped(
    q_BHK: Tensor,
    k_JSK: Tensor,
    v_JSK: Tensor,
    scale: float | None,
    mask_BS: Tensor | None,
    softcap: float,
) -> Tensor:
    (rows, heads, features), kv_heads = q_BHK.shape, k_JSK.shape[0]
    scale = features**-0.5 if scale is None else scale
    q_JGBK = q_BHK.view(rows, kv_heads, heads // kv_heads, features).permute(1, 2, 0, 3)
    scores_JGBS = soft_cap(q_JGBK @ k_JSK[:, None].transpose(2, 3) * scale, softcap)
    if mask_BS is not None:
        scores_JGBS += mask_BS
    weights_JGBS = scores_JGBS.softmax(-1, dtype=torch.float32).to(q_BHK.dtype)
    return (weights_JGBS @ v_JSK[:, None]).permute(2, 0, 1, 3).reshape(rows, -1)
