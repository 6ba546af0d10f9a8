"""One request's state, and how the next tokens of several become one batch."""

import math
from dataclasses import dataclass

import torch

from tsqp.model.attention import Segment
from tsqp.model.ops import ATTENTION_BLOCK
from tsqp.tee.decoder import Batch
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.text_stream import TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine."""

    id: int
    params: SamplingParams
    token_ids: list[int]  # the prompt, then what was generated
    prompt_tokens: int
    capacity: int  # tokens, prompt included, at which it ends
    sampler: Sampler
    stream: TextStream | None
    computed: int = 0  # tokens whose KV is in the cache

    @property
    def remaining(self) -> int:
        """Known tokens that have yet to be computed."""
        return len(self.token_ids) - self.computed

    @property
    def in_prompt(self) -> bool:
        """Whether the next token to be computed is one of the prompt's."""
        return self.computed < self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a sequence, from position `start` on."""

    sequence: Sequence
    start: int
    length: int

    @property
    def ends_known_tokens(self) -> bool:
        """Whether the token after this chunk is the next to be chosen."""
        return self.start + self.length == len(self.sequence.token_ids)

    def split(self, parts: int) -> list["Chunk"]:
        """At most so many chunks, in order; attention is computed in the same blocks as in one."""
        step = ATTENTION_BLOCK * math.ceil(self.length / parts / ATTENTION_BLOCK)
        return [
            Chunk(self.sequence, self.start + first, min(step, self.length - first))
            for first in range(0, self.length, step)
        ]


def flat_batch(chunks: list[Chunk]) -> Batch:
    """The tokens of these chunks as the decoder takes them."""
    token_ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    logits_rows: list[int] = []
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.start
        end = start + chunk.length
        token_ids += sequence.token_ids[start:end]
        positions += range(start, end)
        segments.append(Segment(sequence.id, start, chunk.length))
        if chunk.ends_known_tokens:
            logits_rows.append(len(token_ids) - 1)
    return Batch(
        torch.tensor(token_ids, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        segments,
        torch.tensor(logits_rows, dtype=torch.int64),
    )
