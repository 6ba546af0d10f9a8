"""The digests of a model's shards, one for each worker that holds a shard.

A shard of integers is some rows of every group's integers and scales [P1]. A shard of
floating-point weights is some rows of every group's weight, and some columns of the embedding. The
names of tensors tell which rows or columns they are, so no shard has the digest of another one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tsqp.checkpoint.blocks import read_blocks, read_rows
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.quantize import IntegerWeights, add_to_digest
from tsqp.checkpoint.weights_digest import TensorHash, WeightsDigest, hashing
from tsqp.model.config import EMBEDDING, linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import Shard, all_shards


class ShardDigests:
    """Digests of integer weights, computed from whole groups as they are loaded.

    Args:
        count: how many shards there are; 1 for a whole model, of which there is no other digest.
    """

    def __init__(self, count: int) -> None:
        self._shards = all_shards(count) if count > 1 else []
        self._begin()

    def add(self, group: LinearGroup, weights: IntegerWeights) -> None:
        """Add a whole group. A group that comes again begins another pass over all groups."""
        if group in self._added:
            self._begin()
        self._added.add(group)
        for shard, digest in zip(self._shards, self._digests, strict=True):
            add_to_digest(digest, group, weights.of_rows(shard.rows_of(group)), shard)

    def hexdigests(self) -> tuple[str, ...]:
        """The digest of each shard, in their order; none of a whole model."""
        return tuple(digest.hexdigest() for digest in self._digests)

    def _begin(self) -> None:
        self._added: set[LinearGroup] = set()
        self._digests = [WeightsDigest() for _ in self._shards]


def float_shard_digests(checkpoint: Checkpoint, dtype: torch.dtype, count: int) -> tuple[str, ...]:
    """The digest of each shard of floating-point weights; none of a whole model.

    Holds a block of rows at a time.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
    """
    found = []
    for shard in all_shards(count) if count > 1 else []:
        digest = WeightsDigest()
        columns = shard.rows(checkpoint.config.hidden_size)
        for _ in read_columns(checkpoint, columns, dtype, digest):
            pass
        for group in linear_groups(checkpoint.config):
            for _ in read_shard(checkpoint, group, shard, dtype, digest):
                pass
        found.append(digest.hexdigest())
    return tuple(found)


def read_shard(
    checkpoint: Checkpoint,
    group: LinearGroup,
    shard: Shard,
    dtype: torch.dtype,
    digest: WeightsDigest,
) -> Iterator[tuple[slice, Tensor]]:
    """A shard's rows of a group's weight, added to `digest`, and where each block lies among them.

    Raises:
        CheckpointError: see `read_blocks`.
    """
    rows = shard.rows_of(group)
    name, shape = group.integer_names_of(rows)[0], (shard.size_of(group), group.width)
    yield from _hashed(read_rows(checkpoint, group, rows, dtype), name, shape, dtype, digest)


def read_columns(
    checkpoint: Checkpoint, columns: slice, dtype: torch.dtype, digest: WeightsDigest
) -> Iterator[tuple[slice, Tensor]]:
    """Some columns of the embedding, added to `digest`, and to which rows each block belongs.

    Raises:
        CheckpointError: see `read_blocks`.
    """
    config = checkpoint.config
    shape = config.vocab_size, config.hidden_size
    blocks = (
        (rows, block[:, columns].contiguous())
        for rows, block in read_blocks(checkpoint, EMBEDDING, shape, dtype)
    )
    name = f"{EMBEDDING}[:, {columns.start}:{columns.stop}]"
    shape = config.vocab_size, columns.stop - columns.start
    yield from _hashed(blocks, name, shape, dtype, digest)


def _hashed(
    blocks: Iterator[tuple[slice, Tensor]],
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    digest: WeightsDigest,
) -> Iterator[tuple[slice, Tensor]]:
    found = TensorHash(name, shape, dtype)
    with hashing(found) as add:
        for rows, block in blocks:
            add(block)
            yield rows, block
    digest.add(found)
