"""`--privacy tee`: everything is computed in this process. The baseline of all other modes."""

import torch
from torch.nn import functional as F

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.footprint import float_bytes
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.weights import LinearWeights, read_embedding, read_linear
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.model.config import linear_groups, output_projection
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import CachedAttention, kv_in_blocks
from tsqp.nn.kv_cache import KvCache
from tsqp.tee.offload.offload import Attention, Embedding, Linear, Ready, Request, attend_here
from tsqp.tee.placement import IN_TEE


class LocalOffload:
    """Answers every request at once, in floating point."""

    placement = IN_TEE
    most_scores = 0

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        progress: Progress = silent,
        digest: WeightsDigest | None = None,
        kv: KvCache | None = None,
    ) -> None:
        """Read all weights.

        Args:
            kv: where keys and values are kept; without one, in a new cache without a limit.
            digest: receives every tensor that is read.
            progress: called with the bytes done and their total.
        """
        config = checkpoint.config
        self.kv = kv_in_blocks(config, dtype) if kv is None else kv
        self._attention = CachedAttention(config, self.kv)
        tied = config.tie_word_embeddings
        done = Counter(float_bytes(config, dtype), progress)
        self._embedding_VD = read_embedding(checkpoint, dtype, digest, multiplies=tied)
        done.add(self._embedding_VD.nbytes)
        self._linear: dict[LinearGroup, LinearWeights] = {}
        for group in linear_groups(config):
            if tied and group == output_projection(config):  # one copy in memory serves both
                self._linear[group] = LinearWeights(self._embedding_VD, None)
            else:
                self._linear[group] = read_linear(checkpoint, group, dtype, digest)
                done.add(self._linear[group].nbytes)

    def start(self, request: Request) -> Ready:
        if isinstance(request, Linear):
            weights = self._linear[request.group]
            return Ready(F.linear(request.x_TD, weights.weight_FD, weights.bias_F))
        if isinstance(request, Attention):
            return attend_here(self._attention, request)
        assert isinstance(request, Embedding)
        return Ready(F.embedding(request.token_ids_T, self._embedding_VD))

    def close(self) -> None:
        self._linear.clear()
