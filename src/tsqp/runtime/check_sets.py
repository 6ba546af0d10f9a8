"""Check vectors for workers that come and go: each set is used with one worker only [P6]."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic

from tsqp.errors import HandshakeError
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import Shard
from tsqp.tee.offload.masked import Group, Kept

Set = Mapping[LinearGroup, Group[Kept]]

SPARE_SETS = 4  # of each shard, for workers that a file names later


class CheckSets(Generic[Kept]):
    """The groups of each shard, with check vectors. Any thread may use this.

    Args:
        count: number of shards.
        drawn: for each shard, the sets that were drawn while the weights were there.
        draw: draws another set, if the weights are still there.
    """

    def __init__(
        self,
        count: int,
        drawn: Sequence[Sequence[Set[Kept]]],
        draw: Callable[[Shard], Set[Kept]] | None = None,
    ) -> None:
        self._count = count
        self._left = [list(sets) for sets in drawn] or [[] for _ in range(count)]
        self._draw = draw
        self._lock = threading.Lock()

    def take(self, shard: int) -> Set[Kept]:
        """A set for one worker of a shard, counted from 0.

        Raises:
            HandshakeError: there is none left.
        """
        with self._lock:
            if self._left[shard]:
                return self._left[shard].pop(0)
        if self._draw is None:
            raise HandshakeError(
                "Check vectors for more workers cannot be drawn, because lattice masks do not keep "
                "the weights; start again to use this worker."
            )
        return self._draw(Shard(shard + 1, self._count))

    def give_back(self, shard: int, groups: Set[Kept]) -> None:
        """Take back the set of a worker that leaves, and never failed a check."""
        with self._lock:
            self._left[shard].append(groups)
