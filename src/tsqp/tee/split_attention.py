"""Attention whose products run elsewhere and whose softmax runs here.

Shape suffixes: T tokens of all sequences, flat; R rows that are wanted; D features; H query heads;
J key/value heads; K features of one head; S tokens of a sequence; N scores of all sequences, flat.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tsqp.model.config import ModelConfig
from tsqp.nn.attention import Segment
from tsqp.nn.ops import ATTENTION_BLOCK, attention_weights
from tsqp.tee.offload.offload import Attention, AttentionScores, Request, WeightedValues
from tsqp.tee.stats import Stats

MAX_SEGMENTS = 1024  # in one request


def split_attention(
    whole: Attention,
    config: ModelConfig,
    wanted_R: Tensor | None,
    most_scores: int,
    stats: Stats,
) -> Generator[Request, Tensor, Tensor]:
    """Attention and the output projection of a layer, in as many parts as the scores need.

    Args:
        whole: the attention to compute.
        config: defines how scores become weights.
        wanted_R: the rows whose answer is needed, ascending, or None for all. Keys and values of
            all rows are kept.
        most_scores: maximum number of scores in one answer.

    Returns:
        o_RD, in private memory.
    """
    heads = whole.q_THK.shape[1]
    softmax = partial(
        attention_weights,
        scale=config.attention_scale,
        window=config.layers[whole.layer].window,
        softcap=config.attention_softcap,
    )
    is_wanted_T = torch.ones(len(whole.q_THK), dtype=torch.bool)
    if wanted_R is not None:
        is_wanted_T.zero_()[wanted_R] = True
    several = list(blocks(whole.segments, heads, most_scores))
    q_THK, k_TJK, v_TJK = whole.q_THK, whole.k_TJK, whole.v_TJK
    if len(several) > 1:  # they may be views of an answer, and must outlive it
        q_THK, k_TJK, v_TJK = q_THK.clone(), k_TJK.clone(), v_TJK.clone()
    outputs = []
    first = 0
    for segments in several:
        rows = slice(first, first + sum(segment.length for segment in segments))
        first = rows.stop
        scores_N = yield AttentionScores(
            whole.layer, q_THK[rows], k_TJK[rows], v_TJK[rows], segments
        )
        with stats.time("softmax"):
            weights = _weights(segments, scores_N, heads, is_wanted_T[rows], softmax)
        if weights:
            outputs.append((yield WeightedValues(whole.layer, weights)).clone())
    return torch.cat(outputs) if outputs else whole.q_THK.new_empty(0)


def blocks(segments: Sequence[Segment], heads: int, most_scores: int) -> Iterator[list[Segment]]:
    """Cut segments into pieces, and put as many into one request as fit into its answer.

    The pieces of a segment depend only on that segment. A piece does not see keys after its own
    last one, so about half of the square of a long prompt is never computed.
    """
    block: list[Segment] = []
    room = most_scores
    for segment in segments:
        end = segment.start + segment.length
        rows = min(ATTENTION_BLOCK, max(1, most_scores // (heads * end)))
        for start in range(segment.start, end, rows):
            piece = Segment(segment.sequence, start, min(rows, end - start))
            scores = heads * piece.length * (piece.start + piece.length)
            if block and (scores > room or len(block) == MAX_SEGMENTS):
                yield block
                block, room = [], most_scores
            block.append(piece)
            room -= scores
    yield block


def _weights(
    segments: Sequence[Segment],
    scores_N: Tensor,
    heads: int,
    is_wanted_T: Tensor,
    softmax: Callable[[Tensor, Tensor], Tensor],
) -> list[tuple[int, Tensor]]:
    """The sequence and the weights, [H, R, S], of each segment that has wanted rows."""
    found = []
    ends = [segment.start + segment.length for segment in segments]
    sizes = [heads * s.length * end for s, end in zip(segments, ends, strict=True)]
    parts = zip(
        segments,
        ends,
        scores_N.split_with_sizes(sizes),
        is_wanted_T.split_with_sizes([segment.length for segment in segments]),
        strict=True,
    )
    for segment, end, part_N, wanted_T in parts:
        scores_HTS, positions_T = part_N.view(heads, -1, end), torch.arange(segment.start, end)
        if not wanted_T.all():
            scores_HTS, positions_T = scores_HTS[:, wanted_T], positions_T[wanted_T]
        if len(positions_T):
            found.append((segment.sequence, softmax(scores_HTS, positions_T)))
    return found
