"""Log-probabilities of tokens, from the model's own logits.

Shape suffixes: R rows of logits; B rows of one block; V vocabulary; N likeliest tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tsqp.tee.sampling import Logprob, TokenLogprobs

BLOCK_ROWS = 32  # rows in float64 at once, to bound the memory


def in_blocks(logits_RV: Tensor, next_R: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the rows: logprobs_BV, float64, and next_B."""
    for first in range(0, len(next_R), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        yield logits_RV[rows].double().log_softmax(dim=1), next_R[rows]


def rate(logits_RV: Tensor, next_R: Tensor, count: int) -> list[TokenLogprobs]:
    """The log-probability of each token of `next_R`, int64, and the `count` likeliest tokens."""
    rated = []
    for logprobs_BV, next_B in in_blocks(logits_RV, next_R):
        chosen_B1 = logprobs_BV.gather(1, next_B[:, None])
        ranks = (1 + (logprobs_BV > chosen_B1).sum(dim=1)).tolist()
        top_BN = torch.topk(logprobs_BV, count, dim=1)
        tops = zip(top_BN.indices.tolist(), top_BN.values.tolist(), strict=True)
        for token_id, [logprob], rank, (ids, values) in zip(
            next_B.tolist(), chosen_B1.tolist(), ranks, tops, strict=True
        ):
            top = tuple(Logprob(*each) for each in zip(ids, values, strict=True))
            rated.append(TokenLogprobs(token_id, logprob, rank, top))
    return rated
