"""`--privacy open --fuse layer`: the worker runs whole layers, one call each, and keeps the KV."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tsqp.model.config import Key, ModelConfig
from tsqp.tee.offload.base import Layer, Pending, Request
from tsqp.tee.offload.open import OpenLinear
from tsqp.tee.offload.remote_kv import RemoteKv
from tsqp.tee.placement import OPEN_LAYERS
from tsqp.wire import messages
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Span
from tsqp.wire.tensors import Spec


class OpenLayersOffload(OpenLinear):
    """Sends plain token ids, and hidden features before each layer."""

    placement = OPEN_LAYERS
    most_scores = 0

    def __init__(
        self,
        channel: Channel,
        config: ModelConfig,
        dtype: torch.dtype,
        biases_F: Mapping[Key, Tensor],
        timeout: float,
    ) -> None:
        kv = RemoteKv(channel, timeout)
        super().__init__(channel, config, dtype, biases_F, timeout, kv)

    def start(self, request: Request) -> Pending:
        if not isinstance(request, Layer):
            return super().start(request)
        spans = tuple(Span(s.sequence, s.start, s.length, s.known) for s in request.segments)
        output = Spec(tuple(request.x_TD.shape), self._dtype)
        return self.submit(messages.Layer(request.layer, spans), (request.x_TD,), output)
