"""`--privacy tee`: everything is computed in this process. The baseline of all other modes."""

import torch
from torch.nn import functional as F

from tsqp.model.attention import CachedAttention
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import LAYER_GROUPS
from tsqp.model.weights import LinearWeights, lay_out, read_embedding, read_linear
from tsqp.tee.offload.base import LM_HEAD, Attention, Embedding, Linear, Ready, Request, attend_here
from tsqp.tee.placement import IN_TEE


class LocalOffload:
    """Answers every request at once, in floating point."""

    placement = IN_TEE
    most_scores = 0

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = checkpoint.config
        self.attention = CachedAttention(config, dtype)
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
            return attend_here(self.attention, request)
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
