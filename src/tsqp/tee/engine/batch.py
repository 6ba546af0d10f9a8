"""How the next tokens of several sequences become batches for the decoder."""

from collections.abc import Sequence

import torch

from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch
from tsqp.tee.engine.sequence import Chunk


def split_into_microbatches(
    chunks: Sequence[Chunk], microbatches: int, *, may_cut: bool = True
) -> list[list[Chunk]]:
    """Divide the tokens of a step; the later part of a long prompt goes to a later microbatch.

    Args:
        may_cut: whether a prompt may be divided between microbatches.
    """
    parts: list[list[Chunk]] = [[] for _ in range(microbatches)]
    for chunk in chunks:
        pieces = chunk.split(microbatches if may_cut else 1)
        if len(pieces) == 1:
            min(parts, key=lambda part: sum(each.length for each in part)).append(chunk)
        else:
            for part, piece in zip(parts, pieces, strict=False):
                part.append(piece)
    return [part for part in parts if part]


def flat_batch(chunks: Sequence[Chunk]) -> Batch:
    """The tokens of these chunks, in the form that the decoder takes."""
    token_ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    logits_rows: list[int] = []
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.start
        end = start + chunk.length
        logits_rows += [len(token_ids) + row for row in chunk.wanted]
        token_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        segments.append(Segment(sequence.kv_id, start, chunk.length, known=len(sequence.token_ids)))
    return Batch(
        torch.tensor(token_ids, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        segments,
        torch.tensor(logits_rows, dtype=torch.int64),
    )
