"""The cosines and sines that rotate the tokens of a batch.

Shape suffixes: T tokens of all sequences, flat; h = K/2 for heads of K features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.model.rope import DynamicScaling, Rope, frequencies
from tsqp.nn import ops
from tsqp.nn.attention import Segment


class Rotary:
    """The rotation of one `Rope`, ready for any batch."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._frequency_h = frequencies(rope, head_dim)

    def tables(
        self, positions_T: Tensor, segments: Sequence[Segment], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The tables that `ops.rope` needs for these tokens."""
        frequency = self._frequency_h
        if isinstance(self._rope.scaling, DynamicScaling):
            frequency = torch.cat([self._frequencies_of(segment) for segment in segments])
        return ops.rope_tables(positions_T, frequency, dtype, self._rope.attention_factor)

    def _frequencies_of(self, segment: Segment) -> Tensor:
        """[T, h]: the frequencies for the sequence's known length, however it is divided."""
        known = max(segment.known, segment.end)
        return frequencies(self._rope, self._head_dim, known).expand(segment.length, -1)
