"""Shards of a model: each worker holds some output features of every group of linear layers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tsqp.algebra.residue_blocks import BLOCK
from tsqp.errors import UnsupportedModel, UsageError
from tsqp.model.linear_group import LinearGroup

MAX_SHARDS = 64
_SHARD = re.compile(r"([1-9][0-9]?)/([1-9][0-9]?)\Z")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard.

    Attributes:
        number: 1 … count.
        count: how many shards the model has; 1 for the whole model.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        assert 1 <= self.number <= self.count <= MAX_SHARDS

    def rows(self, features: int) -> slice:
        """The output features that this shard holds of a group with so many.

        Shards differ by at most one block of 32 features. Only the last one may end inside a
        block, because lattice masks are stored in blocks. A group of few blocks may leave a shard
        without features.
        """
        blocks = -(-features // BLOCK)
        first = blocks * (self.number - 1) // self.count * BLOCK
        stop = blocks * self.number // self.count * BLOCK
        return slice(first, min(stop, features))

    def rows_of(self, group: LinearGroup) -> slice:
        """The output features that this shard holds of a group."""
        return self.rows(group.features)

    def size_of(self, group: LinearGroup) -> int:
        """How many output features these are."""
        rows = self.rows_of(group)
        return int(rows.stop - rows.start)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the model."""
        return self.count == 1

    def __str__(self) -> str:
        return f"shard {self.number} of {self.count}"


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """The shard that a user named, such as "2/4".

    Raises:
        UsageError: it is not a shard.
    """
    match = _SHARD.match(text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count <= MAX_SHARDS:
        raise UsageError(
            f"--shard takes NUMBER/COUNT, such as 2/4, with at most {MAX_SHARDS} shards."
        )
    return Shard(number, count)


def all_shards(count: int) -> list[Shard]:
    """All shards of a model, in the order of their features."""
    return [Shard(number, count) for number in range(1, count + 1)]


def check_divisible(groups: Iterable[LinearGroup], count: int) -> None:
    """Raise UnsupportedModel unless each of `count` shards gets features of every group."""
    for group in groups:
        if -(-group.features // BLOCK) < count:
            raise UnsupportedModel(
                f"The {group} has {group.features} output features, too few for {count} shards of "
                f"{BLOCK} or more; use fewer shards."
            )
