"""`open --fuse layer`: a whole layer on the worker; `tee/decoder.py` has the same, in pieces.

Shape suffixes: T tokens of all sequences, flat; D hidden and F output features of a linear layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.gpu.worker_weights import ModelWeights
from tsqp.model.config import layer_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import CachedAttention, Segment
from tsqp.nn.kv_cache import KvCache
from tsqp.nn.layers import Tables


class FusedLayers:
    """Runs layers of one model, on keys and values of whichever sequences the caller names."""

    def __init__(self, weights: ModelWeights, cache: KvCache) -> None:
        self._weights = weights
        layers = range(weights.config.num_layers)
        self._groups = [layer_groups(weights.config, layer) for layer in layers]
        self._attention = CachedAttention(weights.config, cache)

    def tables(self, segments: Sequence[Segment]) -> Tables:
        """The rotation of these tokens, which is the same for all layers."""
        positions = [torch.arange(s.start, s.start + s.length) for s in segments]
        return self._weights.layers.tables(torch.cat(positions), segments)

    def run(self, layer: int, x_TD: Tensor, segments: Sequence[Segment], tables: Tables) -> Tensor:
        """x_TD after a layer, in fresh memory on the device of the weights."""
        layers, groups = self._weights.layers, self._groups[layer]
        x_TD = self._weights.backend.to_device(x_TD)
        h_TD = layers.norm(layer, "attention", x_TD)
        qkv = layers.heads(layer, self._linear(groups.qkv, h_TD), tables)
        y_TD = self._attention.attend(layer, *qkv, segments)
        layers.add(layer, "attention", x_TD, self._linear(groups.o, y_TD))
        h_TD = layers.norm(layer, "mlp", x_TD)
        h_TI = layers.gated(self._linear(groups.gate_up, h_TD))
        layers.add(layer, "mlp", x_TD, self._linear(groups.down, h_TI))
        return x_TD

    def _linear(self, group: LinearGroup, x_TD: Tensor) -> Tensor:
        weights = self._weights
        return F.linear(x_TD, weights.linear_FD[group], weights.biases_F.get(group))
