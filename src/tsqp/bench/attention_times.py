"""`tsqp bench attention`: attention of one token of each sequence, against the memory rate.

The keys and values of a token are read once, and hardly anything is computed with them, so the
memory rate is the limit.

Shape suffixes: T tokens, one of each sequence; H query heads; J key/value heads; K features
of one head; S tokens of a sequence.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import torch
from rich.table import Table

from tsqp.bench.figures import Figure
from tsqp.bench.hardware_limits import measure_limits
from tsqp.bench.host import describe_machine
from tsqp.bench.output import new_table, show
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.weights import parse_dtype
from tsqp.errors import UsageError
from tsqp.model.config import ModelConfig
from tsqp.nn import ops
from tsqp.nn.attention import CachedAttention, Segment
from tsqp.nn.kv_cache import KV_BLOCK, KvCache

MOST_SEQUENCES, MOST_TOKENS = 1024, 2**17
LEAST_BYTES = 2**28  # of keys and values in one pass: more than the caches hold
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class AttentionFigures:
    """Times for one layer, one number of sequences, and one length.

    Attributes:
        layer_us: appending one token to each sequence, and its attention, in one layer.
        bytes_per_s: bytes of keys and values that are read in this time.
        over_contiguous: layer_us divided by the time of attention over keys and values that lie in
            one plain tensor for each sequence, measured right before it.
    """

    sequences: int
    tokens: int
    layer_us: Figure
    bytes_per_s: Figure
    over_contiguous: Figure


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """The figures of all cases, and the rate at which memory is read."""

    model: str
    dtype: str
    threads: int
    attention: list[AttentionFigures]
    read_bytes_per_s: float
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure_attention(
    model: str, dtype: str, sequences: Sequence[int], tokens: Sequence[int], *, threads: int
) -> AttentionResult:
    """Measure all numbers of sequences with all lengths, for the geometry of a model.

    Raises:
        UsageError: the model has no room for so many tokens.
        TSQPError: the model cannot be read.
    """
    checkpoint = open_checkpoint(model)
    try:
        config, kind = checkpoint.config, parse_dtype(dtype, checkpoint.config)
    finally:
        checkpoint.close()
    if max(tokens) > config.max_positions:
        raise UsageError(f"--tokens: {model} takes at most {config.max_positions} tokens.")
    torch.set_num_threads(threads)
    return AttentionResult(
        model=model,
        dtype=str(kind).removeprefix("torch."),
        threads=threads,
        attention=[_measure(config, kind, many, length) for many in sequences for length in tokens],
        read_bytes_per_s=measure_limits(kind).read_bytes_per_s,
        machine=describe_machine(),
    )


def tables(result: AttentionResult) -> Iterator[Table]:
    """One row for each case."""
    table = new_table(
        f"Attention of one token of each sequence: {result.model}, {result.dtype}",
        "sequences", "tokens", "a layer, µs", "GB/s", "of the memory rate", "÷ contiguous",
    )  # fmt: skip
    for each in result.attention:
        rate = each.bytes_per_s.median
        table.add_row(
            str(each.sequences), str(each.tokens), show(each.layer_us, 0), f"{rate / 1e9:.1f}",
            f"{rate / result.read_bytes_per_s:.0%}", show(each.over_contiguous, 2),
        )  # fmt: skip
    yield table


def notes(result: AttentionResult) -> Iterator[str]:
    """The limit of the hardware."""
    yield (
        f"A product with a vector reads {result.read_bytes_per_s / 1e9:.1f} GB/s from memory with "
        f"{result.threads} threads."
    )


def _measure(
    config: ModelConfig, dtype: torch.dtype, sequences: int, tokens: int
) -> AttentionFigures:
    case = _Case(config, dtype, sequences, tokens)
    measured: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        contiguous_s, cached_s = _seconds(case.contiguous), _seconds(case.cached)
        case.forget()
        measured["layer_us"].append(1e6 * cached_s / case.layers)
        measured["bytes_per_s"].append(case.bytes_read / cached_s)
        measured["over_contiguous"].append(cached_s / contiguous_s)
    figures = {name: Figure.of(values) for name, values in measured.items()}
    return AttentionFigures(sequences=sequences, tokens=tokens, **figures)


def _seconds(run: Callable[[], None]) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


class _Case:
    """Sequences of one length, in as many layers and copies as the caches cannot hold."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, sequences: int, tokens: int
    ) -> None:
        self._config, self._past = config, tokens - 1
        heads, features = config.num_kv_heads, config.head_dim
        layer_bytes = 2 * sequences * heads * tokens * features * dtype.itemsize
        layers = min(config.num_layers, -(-LEAST_BYTES // layer_bytes))
        copies = -(-LEAST_BYTES // (layers * layer_bytes))
        self.layers = layers * copies  # that one pass computes
        self.bytes_read = self.layers * layer_bytes
        self._steps = [
            (layer, range(copy * sequences, (copy + 1) * sequences))
            for copy in range(copies)
            for layer in range(layers)
        ]
        self._cache = KvCache(layers, heads, features, dtype, block=KV_BLOCK)
        self._attention = CachedAttention(config, self._cache)
        past_TJK = torch.randn(self._past, heads, features).to(dtype)
        for sequence in range(copies * sequences):
            self._cache.alloc(sequence, tokens)
            for layer in range(layers):
                self._cache.append(sequence, layer, 0, past_TJK, past_TJK)
        self._q_THK = torch.randn(sequences, config.num_heads, features).to(dtype)
        self._k_TJK = torch.randn(sequences, heads, features).to(dtype)
        self._plain = [
            [torch.randn(2, heads, tokens, features).to(dtype) for _ in numbers]
            for _, numbers in self._steps
        ]

    def cached(self) -> None:
        """Append a token to each sequence, and attend, as the decoder does."""
        q_THK, k_TJK = self._q_THK, self._k_TJK
        for layer, numbers in self._steps:
            segments = [Segment(number, self._past, 1) for number in numbers]
            self._attention.attend(layer, q_THK, k_TJK, k_TJK, segments)

    def forget(self) -> None:
        """Forget the tokens that `cached` appended."""
        for _, numbers in self._steps:
            for number in numbers:
                self._cache.truncate(number, self._past)

    def contiguous(self) -> None:
        """Attend over plain tensors of the same size."""
        scale, q_THK = self._config.attention_scale, self._q_THK
        for several in self._plain:
            rows = [
                ops.attention(q_THK[n : n + 1], k_JSK, v_JSK, scale=scale)[0]
                for n, (k_JSK, v_JSK) in enumerate(several)
            ]
            torch.cat(rows)
