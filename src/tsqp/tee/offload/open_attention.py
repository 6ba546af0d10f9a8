"""`--privacy open --attention gpu`: the worker keeps the KV and computes Q·Kᵀ and P·V too.

Only the keys and values of new tokens are sent. P·V and the output projection are one call. The
softmax between the products stays in the TEE.

Shape suffixes: T tokens; H query heads; S tokens of a sequence; N numbers of all sequences, flat.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tsqp.model.config import ModelConfig, layer_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.offload.offload import AttentionScores, Pending, Request, WeightedValues
from tsqp.tee.offload.open import OpenLinear, RemoteAnswer, SplitAnswer
from tsqp.tee.offload.remote_kv import RemoteKv
from tsqp.tee.placement import OPEN_ATTENTION
from tsqp.wire import messages
from tsqp.wire.call_limit import rows_within
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Span, Weighted
from tsqp.wire.tensors import Spec

MAX_SCORES = 2**23  # in one call: 32 MiB in float32

Weights = Sequence[tuple[int, Tensor]]  # sequences, and weights [H, T, S] of each


class OpenAttentionOffload(OpenLinear):
    """Sends plain token ids, activations, queries, keys, values and attention weights."""

    placement = OPEN_ATTENTION

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
        self._num_heads = config.num_heads
        layers = range(config.num_layers)
        self._o_biases_F = [biases_F.get(layer_groups(config, layer).o) for layer in layers]
        # A quarter of a call is for queries, keys and values, or for what becomes of them.
        by_bytes = channel.max_call_bytes * 3 // 4 // dtype.itemsize
        # Half of the work is for the output projection.
        by_work = channel.welcome.max_call_macs // 2 // config.head_dim
        self.most_scores = max(1, min(MAX_SCORES, by_bytes, by_work))
        o_macs = config.num_heads * config.head_dim * config.hidden_size
        self._most_rows = rows_within(channel.welcome.max_call_macs // 2, o_macs)

    def start(self, request: Request) -> Pending:
        match request:
            case AttentionScores():
                return self._attention_scores(request)
            case WeightedValues():
                return self._weighted_values(request)
        return super().start(request)

    def _attention_scores(self, request: AttentionScores) -> Pending:
        spans = tuple(Span(s.sequence, s.start, s.length) for s in request.segments)
        scores = self._num_heads * sum(s.length * (s.start + s.length) for s in spans)
        return self.submit(
            messages.AttentionScores(request.layer, spans),
            (request.q_THK, request.k_TJK, request.v_TJK),
            Spec((scores,), self._dtype),
        )

    def _weighted_values(self, request: WeightedValues) -> Pending:
        calls = list(_in_calls(request.weights, self._most_rows))
        if len(calls) == 1:
            return self._submit_weights(request.layer, calls[0])

        def submit(weights: Weights, out: list[RemoteAnswer]) -> None:
            out.append(self._submit_weights(request.layer, weights))

        return SplitAnswer(partial(submit, weights) for weights in calls)

    def _submit_weights(self, layer: int, weights: Weights) -> RemoteAnswer:
        weighted = tuple(
            Weighted(sequence, *weights_HTS.shape[1:]) for sequence, weights_HTS in weights
        )
        weights_N = torch.cat([weights_HTS.flatten() for _, weights_HTS in weights])
        rows = sum(each.rows for each in weighted)
        return self.submit(
            messages.WeightedValues(layer, weighted),
            (weights_N,),
            Spec((rows, self._hidden_size), self._dtype),
            self._o_biases_F[layer],
        )


def _in_calls(weights: Weights, most_rows: int) -> Iterator[Weights]:
    """The same rows in order, at most this many a call."""
    call: list[tuple[int, Tensor]] = []
    room = most_rows
    for sequence, weights_HTS in weights:
        first, rows = 0, weights_HTS.shape[1]
        while first < rows:
            if room == 0:
                yield call
                call, room = [], most_rows
            taken = min(room, rows - first)
            call.append((sequence, weights_HTS[:, first : first + taken]))
            first += taken
            room -= taken
    yield call
