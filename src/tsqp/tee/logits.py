"""Pure functions that apply a request's sampling parameters to the logits of one token.

Shape suffixes: V vocabulary; N token ids, repeated or not; C candidates.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

_LEAST = torch.finfo(torch.float32).min


def add_bias(logits_V: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add `bias` to the logits; it maps token ids to values."""
    added_V = logits_V.clone()
    for token_id, amount in bias.items():
        added_V[token_id] += amount
    return added_V


def penalize_repetition(logits_V: Tensor, ids_N: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `ids_N` less likely, for a penalty above 1 (Keskar et al., CTRL, 2019).

    Positive logits are divided by the penalty, and negative ones are multiplied by it. Results
    beyond the range of float32 are set to its limits.
    """
    logits_N = logits_V[ids_N]
    penalized_V = logits_V.clone()
    penalized_V[ids_N] = torch.where(logits_N < 0, logits_N * penalty, logits_N / penalty)
    return penalized_V.nan_to_num_()  # a penalty beyond float32 is 0 or infinite


def penalize_occurrence(
    logits_V: Tensor, ids_N: Tensor, presence: float, frequency: float
) -> Tensor:
    """Subtract `presence` once, and `frequency` per occurrence, for each token in `ids_N`."""
    count_V = torch.bincount(ids_N, minlength=len(logits_V))
    return logits_V - frequency * count_V - presence * (count_V > 0)


def forbid(logits_V: Tensor, token_ids: Collection[int]) -> Tensor:
    """Set the probability of some tokens to zero, unless no other tokens would remain."""
    forbidden_V = logits_V.clone()
    forbidden_V[list(token_ids)] = _LEAST
    return forbidden_V


def allow_only(logits_V: Tensor, allowed_V: Tensor) -> Tensor:
    """Set the probability of all tokens to zero except those of `allowed_V`, a bool for each.

    Their logits become minus infinity, which is less than those of `forbid`. So a token that is
    forbidden is still chosen if no other token is allowed.
    """
    return torch.where(allowed_V, logits_V, -math.inf)


def candidates(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their weights.

    Returns:
        ids_C, int64, and weight_C, float64. The weights are softmax(logits / temperature) over all
        tokens, so they add up to less than 1 if tokens were dropped. Both are sorted if `top_k` or
        `top_p` dropped any tokens.
    """
    weight_V = torch.softmax((logits_V.double() - logits_V.max()) / temperature, dim=0)
    ids_C, weight_C = _likeliest(logits_V, weight_V, top_k, top_p)
    if min_p > 0:
        kept_C = weight_C >= min_p * weight_C.max()
        ids_C, weight_C = ids_C[kept_C], weight_C[kept_C]
    return ids_C, weight_C


def _likeliest(
    logits_V: Tensor, weight_V: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    vocabulary = len(weight_V)
    keep = top_k if 0 < top_k < vocabulary else vocabulary
    if keep == vocabulary and top_p == 1:
        return torch.arange(vocabulary), weight_V
    if keep < vocabulary:
        eligible_V = logits_V >= logits_V.topk(keep).values[-1]  # more than `keep` if some tie
    else:  # all that are less likely than this add up to less than 1 - top_p
        eligible_V = weight_V >= (1 - top_p) / vocabulary
    ids_C = eligible_V.nonzero()[:, 0]
    # Stable: which of several equal tokens is dropped must not depend on the sorting network.
    ids_C = ids_C[logits_V[ids_C].sort(descending=True, stable=True).indices[:keep]]
    weight_C = weight_V[ids_C]
    if top_p < 1:
        total_C = weight_C.cumsum(0)
        mass = top_p * (total_C[-1] if keep < vocabulary else 1.0)
        count = max(1, int((total_C - weight_C < mass).sum()))  # `mass` may be rounded to 0
        ids_C, weight_C = ids_C[:count], weight_C[:count]
    return ids_C, weight_C
