"""Attention over a KV cache, on the side that keeps the keys and values.

Shape suffixes: T tokens of all sequences, flat; D features; H query heads; J key/value heads;
K features of one head; S tokens in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.model.config import ModelConfig
from tsqp.nn import ops
from tsqp.nn.kv_cache import KV_BLOCK, KvCache


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence inside a flat batch.

    Attributes:
        sequence: the id under which the cache keeps this sequence's KV.
        start: position of the first token in its sequence; equals the KV length before the step.
        length: number of tokens, at least 1.
        known: number of the sequence's tokens that are known at this step, for dynamic rotary
            scaling; 0 if there are none after the segment.
    """

    sequence: int
    start: int
    length: int
    known: int = 0

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length


class CachedAttention:
    """Appends keys and values to the cache of their sequences, and attends causally.

    Args:
        cache: where keys and values are kept.
    """

    def __init__(self, config: ModelConfig, cache: KvCache) -> None:
        self._config = config
        self._cache = cache

    def attend(
        self,
        layer: int,
        q_THK: Tensor,
        k_TJK: Tensor,
        v_TJK: Tensor,
        segments: Sequence[Segment],
    ) -> Tensor:
        """y_TD with D = H·K, the heads concatenated; q and k are already rotated."""
        blocks: list[Tensor] = []
        first = 0
        for segment in segments:
            rows = slice(first, first + segment.length)
            first = rows.stop
            k_JSK, v_JSK = self._cache.append(
                segment.sequence, layer, segment.start, k_TJK[rows], v_TJK[rows]
            )
            blocks += ops.attention(
                q_THK[rows],
                k_JSK,
                v_JSK,
                scale=self._config.attention_scale,
                window=self._config.layers[layer].window,
                softcap=self._config.attention_softcap,
            )
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def kv_in_blocks(
    config: ModelConfig, dtype: torch.dtype, limit_bytes: int | None = None
) -> KvCache:
    """The KV cache of a model in this process, which sequences take in blocks."""
    shape = config.num_layers, config.num_kv_heads, config.head_dim
    return KvCache(*shape, dtype, block=KV_BLOCK, limit_bytes=limit_bytes)
