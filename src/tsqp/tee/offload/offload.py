"""The decoder's requests, and the interface of the offloads that answer them.

The decoder yields a request and is resumed with its answer. An `Offload` starts requests and
owns the KV cache of its sequences. Shape suffixes: T tokens of all sequences, flat; D input and
F output features of a linear layer; H query heads; J key/value heads; K features of one head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from torch import Tensor

from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import CachedAttention, Segment
from tsqp.tee.placement import Placement


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of the embedding table. Answer: x_TD in the model's dtype."""

    token_ids_T: Tensor  # int64


@dataclass(frozen=True, slots=True)
class Linear:
    """One group of linear layers that share their input. Answer: y_TF, outputs concatenated."""

    group: LinearGroup
    x_TD: Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """Append k and v to the cache of each segment's sequence, then attend causally.

    Answer: y_TD with D = H·K, the heads concatenated. q and k are already rotated.
    """

    layer: int
    q_THK: Tensor
    k_TJK: Tensor
    v_TJK: Tensor
    segments: Sequence[Segment]


@dataclass(frozen=True, slots=True)
class AttentionScores:
    """Append k and v to the cache of each segment's sequence, then multiply q with all its keys.

    Answer: flat; for each segment [H, length, start + length], not scaled and not masked.
    """

    layer: int
    q_THK: Tensor
    k_TJK: Tensor
    v_TJK: Tensor
    segments: Sequence[Segment]


@dataclass(frozen=True, slots=True)
class WeightedValues:
    """Multiply weights with the values of their sequences, then with the layer's "o".

    Answer: o_TD, a row for each of the weights' rows.

    Attributes:
        weights: sequences, each with its weights [H, T, S] over the first S tokens that the layer
            holds of it.
    """

    layer: int
    weights: Sequence[tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A whole layer; keys and values are appended to the cache of each segment's sequence.

    Answer: x_TD after it.
    """

    layer: int
    x_TD: Tensor
    segments: Sequence[Segment]


Request = Embedding | Linear | Attention | AttentionScores | WeightedValues | Layer


class Pending(Protocol):
    """A request that has been started.

    `with pending as y:` waits for the answer. The tensor may lie in memory shared with the
    worker: it is valid inside the block only, and must be copied to be kept.

    Attributes:
        waited_s: seconds in which the TEE only waited for the answer; set on entering.
    """

    waited_s: float

    def __enter__(self) -> Tensor: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def cancel(self) -> None:
        """Give up an answer that has not been waited for."""
        ...


class Ready:
    """A request that was answered when it was started; the tensor is private memory."""

    __slots__ = ("_answer", "waited_s")

    def __init__(self, answer: Tensor) -> None:
        self._answer = answer
        self.waited_s = 0.0

    def __enter__(self) -> Tensor:
        return self._answer

    def __exit__(self, *_: object) -> None:
        pass

    def cancel(self) -> None:
        pass


def attend_here(attention: CachedAttention, request: Attention) -> Ready:
    """Compute attention in the TEE, from its own KV cache."""
    r = request
    return Ready(attention.attend(r.layer, r.q_THK, r.k_TJK, r.v_TJK, r.segments))


class Kv(Protocol):
    """Keys and values of sequences, by their ids, on the side that computes attention.

    On the trusted side this is a `KvCache`, which can also extend and copy sequences. On a worker
    it is a `RemoteKv`, where a sequence gets all its room at once.
    """

    def alloc(self, sequence: int, capacity: int) -> None:
        """Make room for `capacity` tokens under a new id.

        Raises:
            OutOfMemory: there is no room.
        """
        ...

    def capacity(self, sequence: int) -> int:
        """The number of tokens for which a sequence has room."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        ...

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        ...


class Offload(Protocol):
    """Answers the decoder's requests, and owns the KV cache of its sequences.

    Attributes:
        placement: which side runs which operation. It decides which requests the decoder makes.
        most_scores: maximum number of attention scores in one answer, if `placement` splits
            attention.
        kv: the keys and values of its sequences.
    """

    @property
    def placement(self) -> Placement: ...

    @property
    def kv(self) -> Kv: ...

    @property
    def most_scores(self) -> int: ...

    def start(self, request: Request) -> Pending:
        """Begin `request`. Its tensors must not change until it is answered."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...
