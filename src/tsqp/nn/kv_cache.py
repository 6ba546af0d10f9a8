"""Keys and values of the running sequences, on the side that computes attention.

Shape suffixes: J key/value heads; C capacity in tokens; S tokens held; T new tokens; K features of
one head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.checkpoint.weights import check_memory
from tsqp.errors import OutOfMemory

CPU = torch.device("cpu")
KV_BLOCK = 128  # tokens; docs/decisions/0011


@dataclass(slots=True)
class _Entry:
    layers: list[tuple[Tensor, Tensor]]  # views: k_JCK and v_JCK of each layer
    lengths: list[int]  # tokens held by each layer
    capacity: int


class KvCache:
    """Holds one buffer for each layer of a sequence, so that the keys of a head are contiguous.

    A sequence takes memory in whole blocks of tokens. When it needs another block, its buffers are
    replaced by longer ones, one layer after the other.

    Args:
        check: called with the bytes needed and their purpose; raises OutOfMemory.
        takes_memory_at_once: whether the device takes memory when it is reserved. A CPU provides
            it page by page, as tokens arrive.
        block: number of tokens in a block.
        limit_bytes: maximum size of all sequences together; None for no limit.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        check: Callable[[int, str], None] = check_memory,
        *,
        takes_memory_at_once: bool = False,
        block: int = 1,
        limit_bytes: int | None = None,
    ) -> None:
        self._shape = (layers, 2, kv_heads, head_dim)
        self._dtype = dtype
        self._device = device
        self._check = check
        self._takes_memory_at_once = takes_memory_at_once
        self.block = block
        self._entries: dict[int, _Entry] = {}
        self.most_tokens: int | None = None
        if limit_bytes is not None:
            self.most_tokens = limit_bytes // self.bytes_for(block) * block

    @property
    def _reserved_tokens(self) -> int:
        return sum(entry.capacity for entry in self._entries.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for all sequences."""
        return self.bytes_for(self._reserved_tokens)

    @property
    def taken_bytes(self) -> int:
        """Bytes taken from the device already, about."""
        return self.reserved_bytes - self._untouched_bytes

    def bytes_for(self, tokens: int) -> int:
        """Bytes of the keys and values of this many tokens."""
        layers, two, heads, features = self._shape
        return layers * two * heads * tokens * features * self._dtype.itemsize

    @property
    def _untouched_bytes(self) -> int:
        """Bytes reserved but not yet taken from the system, about."""
        if self._takes_memory_at_once:
            return 0
        held = sum(entry.lengths[0] for entry in self._entries.values())
        return self.bytes_for(self._reserved_tokens - held)

    def alloc(self, sequence: int, capacity: int, spare: int = 0) -> None:
        """Make room for `capacity` tokens under a new id.

        Args:
            spare: number of tokens for which there must still be room afterwards.

        Raises:
            OutOfMemory: they would not fit.
        """
        assert sequence not in self._entries, "this sequence has its memory already"
        capacity = self._whole_blocks(capacity)
        self._check_room(capacity, spare)
        layers = self._shape[0]
        buffers = [self._buffer(capacity) for _ in range(layers)]
        self._entries[sequence] = _Entry(buffers, [0] * layers, capacity)

    def extend(self, sequence: int, capacity: int) -> None:
        """Make room for `capacity` tokens in an existing sequence, and keep what it holds.

        Raises:
            OutOfMemory: they would not fit; the sequence is as before.
        """
        entry = self._entries[sequence]
        if capacity <= entry.capacity:
            return
        capacity = self._whole_blocks(capacity)
        self._check_room(capacity - entry.capacity)
        for layer, (k_JCK, v_JCK) in enumerate(entry.layers):
            held = entry.lengths[layer]
            longer_k_JCK, longer_v_JCK = self._buffer(capacity)
            longer_k_JCK[:, :held] = k_JCK[:, :held]
            longer_v_JCK[:, :held] = v_JCK[:, :held]
            entry.layers[layer] = longer_k_JCK, longer_v_JCK
        entry.capacity = capacity

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one sequence into another, which holds none yet."""
        ours, theirs = self._entries[target], self._entries[source]
        assert max(ours.lengths) == 0, "the target holds tokens already"
        assert length <= min(theirs.lengths), "the source does not hold so many tokens"
        assert length <= ours.capacity, "more tokens than were allocated"
        for (k_JCK, v_JCK), (from_k_JCK, from_v_JCK) in zip(
            ours.layers, theirs.layers, strict=True
        ):
            k_JCK[:, :length] = from_k_JCK[:, :length]
            v_JCK[:, :length] = from_v_JCK[:, :length]
        ours.lengths = [length] * len(ours.lengths)

    def append(
        self, sequence: int, layer: int, start: int, k_TJK: Tensor, v_TJK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the tokens from position `start` on.

        Returns:
            k_JSK and v_JSK, views of all tokens that the layer now holds.
        """
        entry = self._entries[sequence]
        k_JCK, v_JCK = entry.layers[layer]
        end = start + k_TJK.shape[0]
        assert start == entry.lengths[layer], "tokens must be appended in order"
        assert end <= entry.capacity, "more tokens than were allocated"
        k_JCK[:, start:end] = k_TJK.transpose(0, 1)
        v_JCK[:, start:end] = v_TJK.transpose(0, 1)
        entry.lengths[layer] = end
        return k_JCK[:, :end], v_JCK[:, :end]

    def values(self, sequence: int, layer: int, length: int) -> Tensor:
        """v_JSK of the first `length` tokens that the layer holds, a view."""
        entry = self._entries[sequence]
        assert length <= entry.lengths[layer], "there are not so many tokens"
        return entry.layers[layer][1][:, :length]

    def capacity(self, sequence: int) -> int:
        """The number of tokens for which a sequence has room."""
        return self._entries[sequence].capacity

    def length(self, sequence: int, layer: int) -> int:
        """The number of tokens that a layer holds."""
        return self._entries[sequence].lengths[layer]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens; the memory stays reserved."""
        entry = self._entries[sequence]
        assert length <= min(entry.lengths), "cannot truncate to more tokens than there are"
        entry.lengths = [length] * len(entry.lengths)

    def free(self, sequence: int) -> None:
        """Give a sequence's memory back."""
        del self._entries[sequence]

    def _whole_blocks(self, tokens: int) -> int:
        return -(-tokens // self.block) * self.block

    def _buffer(self, capacity: int) -> tuple[Tensor, Tensor]:
        """k_JCK and v_JCK of one layer."""
        _, two, heads, features = self._shape
        kv_2JCK = torch.empty(
            (two, heads, capacity, features), dtype=self._dtype, device=self._device
        )
        return kv_2JCK[0], kv_2JCK[1]

    def _check_room(self, tokens: int, spare: int = 0) -> None:
        what = "The KV cache of the running sequences"
        total = self._reserved_tokens + tokens + spare
        if self.most_tokens is not None and total > self.most_tokens:
            raise OutOfMemory(
                f"{what} would take {self.bytes_for(total)} bytes, and --kv-memory allows "
                f"{self.bytes_for(self.most_tokens)}: raise it, or run fewer or shorter sequences."
            )
        self._check(self.bytes_for(tokens) + self._untouched_bytes, what)
