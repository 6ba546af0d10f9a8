"""Keys and values of the running sequences, on the side that computes attention.

Shape suffixes: L layers; J key/value heads; C capacity in tokens; S tokens held; T new tokens;
K features of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.checkpoint.weights import check_memory

CPU = torch.device("cpu")


@dataclass(slots=True)
class _Entry:
    kv_L2JCK: Tensor
    layers: list[tuple[Tensor, Tensor]]  # views: k_JCK and v_JCK of each layer
    lengths: list[int]  # tokens held by each layer


class KvCache:
    """Holds one buffer for each sequence, so that the keys of a head are contiguous.

    Memory is reserved for the whole capacity, but on a CPU the system provides it page by page, as
    tokens arrive.

    Args:
        check: called with the bytes needed and their purpose; raises OutOfMemory.
        takes_memory_at_once: whether the device takes memory when it is reserved.
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
    ) -> None:
        self._shape = (layers, 2, kv_heads, head_dim)
        self._dtype = dtype
        self._device = device
        self._check = check
        self._takes_memory_at_once = takes_memory_at_once
        self._entries: dict[int, _Entry] = {}

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for all sequences."""
        return sum(entry.kv_L2JCK.nbytes for entry in self._entries.values())

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
        return sum(
            entry.kv_L2JCK.nbytes
            * (entry.kv_L2JCK.shape[3] - entry.lengths[0])
            // entry.kv_L2JCK.shape[3]
            for entry in self._entries.values()
        )

    def alloc(self, sequence: int, capacity: int) -> None:
        """Make room for `capacity` tokens under a new id.

        Raises:
            OutOfMemory: they would not fit.
        """
        assert sequence not in self._entries, "this sequence has its memory already"
        layers, two, heads, features = self._shape
        needed = self.bytes_for(capacity)
        self._check(needed + self._untouched_bytes, "The KV cache of the running sequences")
        shape = (layers, two, heads, capacity, features)
        kv_L2JCK = torch.empty(shape, dtype=self._dtype, device=self._device)
        views = [(kv_2JCK[0], kv_2JCK[1]) for kv_2JCK in kv_L2JCK]
        self._entries[sequence] = _Entry(kv_L2JCK, views, [0] * layers)

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
        assert end <= k_JCK.shape[1], "more tokens than were allocated"
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
        return self._entries[sequence].kv_L2JCK.shape[3]

    def length(self, sequence: int, layer: int) -> int:
        """The number of tokens that a layer holds."""
        return self._entries[sequence].lengths[layer]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens."""
        entry = self._entries[sequence]
        assert length <= min(entry.lengths), "cannot truncate to more tokens than there are"
        entry.lengths = [length] * len(entry.lengths)

    def free(self, sequence: int) -> None:
        """Give a sequence's memory back."""
        del self._entries[sequence]
