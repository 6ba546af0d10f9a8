"""Scores a given text: the log-probability of each of its tokens.

Shape suffixes: T tokens; R rows of logits; B rows of one block; V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch, Decoder
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.logprobs import in_blocks
from tsqp.tee.offload.offload import Offload
from tsqp.tee.stats import Stats


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of each token except the first, given all tokens before it.

    Attributes:
        logprobs_T: natural logarithms of probabilities, float64.
        best_T: the likeliest token in its place, int64.
    """

    logprobs_T: Tensor
    best_T: Tensor


@torch.inference_mode()
def score(
    decoder: Decoder,
    offload: Offload,
    sequence: int,
    token_ids: Sequence[int],
    chunk: int,
    stats: Stats,
) -> Scores:
    """Score a text. The offload must already have room for it under the given id.

    Args:
        token_ids: at least two.
        chunk: number of tokens whose logits are held in memory at once.
    """
    ids_T = torch.tensor(token_ids, dtype=torch.int64)
    parts = []
    for first in range(0, len(ids_T) - 1, chunk):
        length = min(chunk, len(ids_T) - 1 - first)
        batch = Batch(
            ids_T[first : first + length],
            torch.arange(first, first + length),
            [Segment(sequence, first, length, known=len(ids_T))],
            logits_rows_R=torch.arange(length),
        )
        [logits_RV] = run_interleaved(offload, [decoder.forward(batch, stats)], stats)
        parts.append(_rate(logits_RV, ids_T[first + 1 : first + length + 1]))
    return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _rate(logits_RV: Tensor, next_R: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = [
        logprobs_BV.gather(1, next_B[:, None])[:, 0]
        for logprobs_BV, next_B in in_blocks(logits_RV, next_R)
    ]
    return torch.cat(logprobs), logits_RV.argmax(dim=1)
