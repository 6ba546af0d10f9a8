"""`--privacy open --fuse layer`: the worker runs whole layers and keeps the KV.

A layer is one call, unless it is more work than the worker does in one.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from tsqp.model.config import ModelConfig
from tsqp.model.linear_group import LinearGroup
from tsqp.model.macs import layer_macs
from tsqp.tee.offload.offload import Layer, Pending, Request
from tsqp.tee.offload.open import OpenLinear, RemoteAnswer, SplitAnswer
from tsqp.tee.offload.remote_kv import RemoteKv
from tsqp.tee.placement import OPEN_LAYERS
from tsqp.wire import messages
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Span
from tsqp.wire.tensors import Spec

Spans = tuple[Span, ...]


class OpenLayersOffload(OpenLinear):
    """Sends plain token ids, and hidden features before each layer."""

    placement = OPEN_LAYERS
    most_scores = 0

    def __init__(
        self,
        channel: Channel,
        config: ModelConfig,
        dtype: torch.dtype,
        biases_F: Mapping[LinearGroup, Tensor],
        timeout: float,
    ) -> None:
        kv = RemoteKv(channel, timeout)
        super().__init__([channel], config, dtype, biases_F, timeout, kv)
        self._most_macs = channel.welcome.max_call_macs
        self._layer_macs = [layer_macs(config, layer) for layer in range(config.num_layers)]
        self._attention_macs = 2 * config.num_heads * config.head_dim  # of a row and a token

    def start(self, request: Request) -> Pending:
        if not isinstance(request, Layer):
            return super().start(request)
        calls = list(self._calls(request))
        if len(calls) == 1:
            return self._submit_rows(request.layer, request.x_TD, calls[0])
        rows = [sum(span.length for span in spans) for spans in calls]

        def submit(x_TD: Tensor, spans: Spans, out: list[RemoteAnswer]) -> None:
            out.append(self._submit_rows(request.layer, x_TD, spans))

        x_TD = request.x_TD.clone()  # it may be an answer, which does not outlive the first call
        parts = zip(x_TD.split_with_sizes(rows), calls, strict=True)
        return SplitAnswer(partial(submit, part_TD, spans) for part_TD, spans in parts)

    def _submit_rows(self, layer: int, x_TD: Tensor, spans: Spans) -> RemoteAnswer:
        output = Spec(tuple(x_TD.shape), self._dtype)
        return self.submit(messages.Layer(layer, spans), (x_TD,), output)

    def _calls(self, request: Layer) -> Iterator[Spans]:
        """The spans of each call, cut so that the worker does no more than it wants to in one."""
        spans: list[Span] = []
        room = self._most_macs
        for segment in request.segments:
            start, end = segment.start, segment.start + segment.length
            row_macs = self._layer_macs[request.layer] + self._attention_macs * end
            known = segment.known
            while start < end:
                rows = min(end - start, room // row_macs)
                if rows == 0 and spans:
                    yield tuple(spans)
                    spans, room = [], self._most_macs
                    continue
                rows = max(1, rows)
                if rows < segment.length:  # a cut must not change what the rotation depends on
                    known = segment.known or end
                spans.append(Span(segment.sequence, start, rows, known))
                start += rows
                room -= rows * row_macs
        yield tuple(spans)
