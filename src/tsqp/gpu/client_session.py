"""A worker's state for one client between calls: keys and values, in `open` only.

Shape suffixes: T tokens of all spans, flat; H query heads; J key/value heads; K features of one
head; S tokens kept of a sequence; N scores of all spans, flat; F output features.
"""

from collections.abc import Iterator, Sequence
from itertools import count

from torch import Tensor

from tsqp.errors import OutOfMemory, ProtocolError
from tsqp.gpu.layer import FusedLayers
from tsqp.gpu.worker_weights import ModelWeights
from tsqp.model.config import layer_groups
from tsqp.model.macs import layer_macs
from tsqp.nn.attention import Segment
from tsqp.nn.kv_cache import KvCache
from tsqp.nn.layers import Tables
from tsqp.wire.call_limit import attention_macs, check_call
from tsqp.wire.messages import (
    Allocate,
    AttentionScores,
    Free,
    Layer,
    Operation,
    Span,
    Truncate,
    Weighted,
    WeightedValues,
)
from tsqp.wire.tensors import Spec

MAX_SEQUENCES = 256  # of one client at a time
MANY_TOKENS = 4096  # in one layer's call, of which the memory is looked at first


class KvStore:
    """Keys and values of all clients: one budget of memory, and keys that no client chooses.

    Args:
        max_call_macs: most multiply-accumulates of one call.
        shares: one session may take this part of the memory.

    Attributes:
        o_FD: the weight of each layer's attention output.
    """

    def __init__(self, weights: ModelWeights, max_call_macs: int, shares: int) -> None:
        config = weights.config
        self.weights = weights
        self.backend = weights.backend
        self.max_call_macs = max_call_macs
        self.cache = KvCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            weights.dtype,
            self.backend.device,
            self.backend.check_room,
            takes_memory_at_once=self.backend.takes_memory_at_once,
        )
        self.layers = FusedLayers(weights, self.cache)
        groups = [layer_groups(config, layer) for layer in range(config.num_layers)]
        self.o_FD = [weights.linear_FD[each.o] for each in groups]
        self.keys = count()
        self._shares = shares

    def check_share(self, required: int) -> None:
        """Raise OutOfMemory if one session would have more than its share of the memory.

        Args:
            required: bytes that the session would have in total.
        """
        share = (self.backend.free_bytes() + self.cache.taken_bytes) // self._shares
        if required > share:
            raise OutOfMemory(
                f"The KV cache of this session would take {required} bytes, and one session may "
                f"take {share} of what the worker has: run fewer or shorter sequences, or "
                "start the worker with --max-sessions 1, which gives all to one session."
            )

    def check_room_for(self, tokens: int) -> None:
        """Raise OutOfMemory unless a layer's activations of this many tokens would fit."""
        c, itemsize = self.weights.config, self.weights.dtype.itemsize
        heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        features = 4 * c.hidden_size + heads + 4 * c.intermediate_size
        self.backend.check_room(tokens * features * itemsize, "A layer of this call")


class KvSession:
    """The sequences of one client. It finds keys only in its own table, and reaches no others."""

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._cache = store.cache
        self._config = store.weights.config
        self._keys: dict[int, int] = {}
        self._tables: tuple[Sequence[Span], Tables] | None = None  # of the layer before

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        """Raise ProtocolError unless this client may ask for this now, with these tensors."""
        wanted_inputs, wanted_outputs = self._specs(operation)
        if list(inputs) != wanted_inputs or list(outputs) != wanted_outputs:
            raise ProtocolError("A call about kept keys and values has tensors of other shapes.")
        check_call(self._macs(operation), self._store.max_call_macs)

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Run an operation that has passed `check`.

        Raises:
            OutOfMemory: there is no room for another sequence.
        """
        match operation:
            case Allocate(sequence, capacity):
                held = [self._cache.capacity(key) for key in self._keys.values()]
                self._store.check_share(self._cache.bytes_for(capacity + sum(held)))
                key = next(self._store.keys)
                self._cache.alloc(key, capacity)
                self._keys[sequence] = key
            case Truncate(sequence, length):
                self._cache.truncate(self._keys[sequence], length)
            case Free(sequence):
                self._cache.free(self._keys.pop(sequence))
            case AttentionScores(layer, spans):
                self._scores(layer, spans, inputs, outputs[0])
            case WeightedValues(layer, weighted):
                self._weighted_values(layer, weighted, inputs[0], outputs[0])
            case Layer(layer, spans):
                self._layer(layer, spans, inputs[0], outputs[0])

    def close(self) -> None:
        """Free all sequences."""
        for key in self._keys.values():
            self._cache.free(key)
        self._keys.clear()

    def _specs(self, operation: Operation) -> tuple[list[Spec], list[Spec]]:
        """The tensors that `operation` takes and returns, after checking that it is allowed."""
        c, dtype = self._config, self._store.weights.dtype
        match operation:
            case Allocate(sequence, capacity):
                self._check_new(sequence, capacity)
            case Truncate(sequence, length):
                key = self._key(sequence)
                held = min(self._cache.length(key, layer) for layer in range(c.num_layers))
                if length > held:
                    raise ProtocolError("A sequence cannot be cut to more tokens than it has.")
            case Free(sequence):
                self._key(sequence)
            case AttentionScores(layer, spans):
                tokens = self._check_spans(layer, spans)
                kv = Spec((tokens, c.num_kv_heads, c.head_dim), dtype)
                scores = c.num_heads * sum(s.length * (s.start + s.length) for s in spans)
                queries = Spec((tokens, c.num_heads, c.head_dim), dtype)
                return [queries, kv, kv], [Spec((scores,), dtype)]
            case Layer(layer, spans):
                hidden = Spec((self._check_spans(layer, spans), c.hidden_size), dtype)
                return [hidden], [hidden]
            case WeightedValues(layer, weighted):
                self._check_layer(layer)
                for each in weighted:
                    if each.length > self._cache.length(self._key(each.sequence), layer):
                        raise ProtocolError("There are weights for more tokens than a layer has.")
                rows = sum(each.rows for each in weighted)
                weights = c.num_heads * sum(each.rows * each.length for each in weighted)
                return [Spec((weights,), dtype)], [Spec((rows, c.hidden_size), dtype)]
        return [], []

    def _macs(self, operation: Operation) -> int:
        """Multiply-accumulates of an operation whose tensors have the right shapes."""
        c = self._config
        match operation:
            case AttentionScores(_, spans):
                return attention_macs(c.num_heads, c.head_dim, _pairs(spans))
            case WeightedValues(layer, weighted):
                pairs = [(each.rows, each.length) for each in weighted]
                o_FD = self._store.o_FD[layer]
                rows = sum(each.rows for each in weighted)
                return attention_macs(c.num_heads, c.head_dim, pairs) + rows * o_FD.numel()
            case Layer(layer, spans):
                rows = sum(span.length for span in spans)
                products = 2 * attention_macs(c.num_heads, c.head_dim, _pairs(spans))
                return products + rows * layer_macs(c, layer)
        return 0

    def _check_new(self, sequence: int, capacity: int) -> None:
        if sequence in self._keys:
            raise ProtocolError("A client allocated the same sequence twice.")
        if len(self._keys) >= MAX_SEQUENCES:
            raise ProtocolError(f"A client may keep {MAX_SEQUENCES} sequences at a time.")
        if capacity > self._config.max_positions:
            raise ProtocolError(
                f"A client wants room for {capacity} tokens in one sequence, but this model "
                f"has a context of {self._config.max_positions}."
            )

    def _check_spans(self, layer: int, spans: Sequence[Span]) -> int:
        """The number of tokens of the spans. A sequence may occur twice, as adjacent spans."""
        self._check_layer(layer)
        held: dict[int, int] = {}
        for span in spans:
            key = self._key(span.sequence)
            if span.start != held.get(key, self._cache.length(key, layer)):
                raise ProtocolError("The tokens of a sequence must follow those that are kept.")
            held[key] = span.start + span.length
            if held[key] > self._cache.capacity(key):
                raise ProtocolError("A sequence has more tokens than it was given room for.")
            if span.known and not held[key] <= span.known <= self._cache.capacity(key):
                raise ProtocolError("A sequence is rotated for a length that it cannot have.")
        return sum(span.length for span in spans)

    def _check_layer(self, layer: int) -> None:
        if layer >= self._config.num_layers:
            raise ProtocolError(f"There is no layer {layer}.")

    def _key(self, sequence: int) -> int:
        key = self._keys.get(sequence)
        if key is None:
            raise ProtocolError("A client named a sequence that it has not allocated.")
        return key

    def _scores(
        self, layer: int, spans: Sequence[Span], inputs: Sequence[Tensor], out_N: Tensor
    ) -> None:
        lengths = [span.length for span in spans]
        shapes = [(self._config.num_heads, s.length, s.start + s.length) for s in spans]
        parts = (*(x.split_with_sizes(lengths) for x in inputs), _parts(out_N, shapes))
        for span, q_THK, k_TJK, v_TJK, out_HTS in zip(spans, *parts, strict=True):
            key = self._keys[span.sequence]
            k_TJK, v_TJK = map(self._store.backend.to_device, (k_TJK, v_TJK))
            k_JSK, _ = self._cache.append(key, layer, span.start, k_TJK, v_TJK)
            self._store.backend.attention_scores(q_THK, k_JSK, out_HTS)

    def _weighted_values(
        self, layer: int, weighted: Sequence[Weighted], weights_N: Tensor, out_TF: Tensor
    ) -> None:
        shapes = [(self._config.num_heads, each.rows, each.length) for each in weighted]
        values = [
            self._cache.values(self._keys[each.sequence], layer, each.length) for each in weighted
        ]
        weights = list(_parts(weights_N, shapes))
        self._store.backend.weighted_values(weights, values, self._store.o_FD[layer], out_TF)

    def _layer(self, layer: int, spans: Sequence[Span], x_TD: Tensor, out_TD: Tensor) -> None:
        layers = self._store.layers
        if len(x_TD) >= MANY_TOKENS:
            self._store.check_room_for(len(x_TD))
        segments = [Segment(self._keys[s.sequence], s.start, s.length, s.known) for s in spans]
        if self._tables is None or self._tables[0] != spans:
            self._tables = spans, layers.tables(segments)
        y_TD = layers.run(layer, x_TD, segments, self._tables[1])
        self._store.backend.to_host(y_TD, out_TD)


def _pairs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The rows of each span, and the tokens that they meet."""
    return [(span.length, span.start + span.length) for span in spans]


def _parts(flat_N: Tensor, shapes: Sequence[tuple[int, int, int]]) -> Iterator[Tensor]:
    """Views of one shape after the other."""
    first = 0
    for heads, rows, columns in shapes:
        size = heads * rows * columns
        yield flat_N[first : first + size].view(heads, rows, columns)
        first += size
