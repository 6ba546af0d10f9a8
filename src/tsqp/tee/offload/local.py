"""`--privacy tee`: everything is computed in this process. The baseline of all other modes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import LAYER_GROUPS, ModelConfig
from tsqp.model.weights import LinearWeights, lay_out, read_embedding, read_linear
from tsqp.tee import ops
from tsqp.tee.kv_cache import KvCache
from tsqp.tee.offload.base import LM_HEAD, Attention, Embedding, Linear, Ready, Request


class LocalAttention:
    """Attention in this process, over a KV cache of its own."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._cache = KvCache(config.num_layers, config.num_kv_heads, config.head_dim, dtype)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of KV reserved for all sequences."""
        return self._cache.reserved_bytes

    def start(self, request: Attention) -> Ready:
        blocks: list[Tensor] = []
        first = 0
        for segment in request.segments:
            rows = slice(first, first + segment.length)
            first = rows.stop
            k_JSK, v_JSK = self._cache.append(
                segment.sequence,
                request.layer,
                segment.start,
                request.k_TJK[rows],
                request.v_TJK[rows],
            )
            blocks += ops.attention(request.q_THK[rows], k_JSK, v_JSK)
        return Ready(blocks[0] if len(blocks) == 1 else torch.cat(blocks))

    def alloc(self, sequence: int, capacity: int) -> None:
        self._cache.alloc(sequence, capacity)

    def truncate(self, sequence: int, length: int) -> None:
        self._cache.truncate(sequence, length)

    def free(self, sequence: int) -> None:
        self._cache.free(sequence)


class LocalOffload:
    """Answers every request at once, in floating point."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = checkpoint.config
        self.attention = LocalAttention(config, dtype)
        self._embedding_VD = read_embedding(checkpoint, dtype)
        groups = [(layer, group) for layer in range(config.num_layers) for group in LAYER_GROUPS]
        self._linear = {
            (layer, group): _read(checkpoint, layer, group, dtype) for layer, group in groups
        }
        if config.tie_word_embeddings:
            self._embedding_VD = lay_out(self._embedding_VD)
            head = LinearWeights(self._embedding_VD, None)  # one copy in memory serves both
        else:
            head = _read(checkpoint, LM_HEAD, "lm_head", dtype)
        self._linear[LM_HEAD, "lm_head"] = head

    def start(self, request: Request) -> Ready:
        if isinstance(request, Linear):
            weights = self._linear[request.layer, request.group]
            return Ready(F.linear(request.x_TD, weights.weight_FD, weights.bias_F))
        if isinstance(request, Attention):
            return self.attention.start(request)
        assert isinstance(request, Embedding)
        return Ready(F.embedding(request.token_ids_T, self._embedding_VD))

    def alloc(self, sequence: int, capacity: int) -> None:
        self.attention.alloc(sequence, capacity)

    def truncate(self, sequence: int, length: int) -> None:
        self.attention.truncate(sequence, length)

    def free(self, sequence: int) -> None:
        self.attention.free(sequence)

    def close(self) -> None:
        self._linear.clear()


def _read(checkpoint: Checkpoint, layer: int, group: str, dtype: torch.dtype) -> LinearWeights:
    weights = read_linear(checkpoint, layer, group, dtype)
    return LinearWeights(lay_out(weights.weight_FD), weights.bias_F)
