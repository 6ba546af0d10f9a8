"""The integer weights of the private modes, the same on both sides [P1].

Shape suffixes: F output and D input features of a group; N rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.algebra.fixed_point import quantize_rows
from tsqp.algebra.params import MAX_WIDTH
from tsqp.checkpoint.blocks import read_rows
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.errors import UnsupportedModel
from tsqp.model.config import ModelConfig, linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class IntegerWeights:
    """One group of linear layers in fixed point; biases are not part of it.

    Attributes:
        weight_FD: int8 in [-127, 127], the parts' outputs concatenated along F.
        scale_F: float32.
    """

    weight_FD: Tensor
    scale_F: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight_FD.nbytes + self.scale_F.nbytes

    def of_rows(self, rows: slice) -> "IntegerWeights":
        """Some output features, in the same memory."""
        return IntegerWeights(self.weight_FD[rows], self.scale_F[rows])


def integer_bytes(config: ModelConfig, shard: Shard = WHOLE) -> int:
    """Bytes of all integer weights and scales of a shard."""
    return sum(shard.size_of(group) * (group.width + 4) for group in linear_groups(config))


def quantize_group(
    checkpoint: Checkpoint, group: LinearGroup, shard: Shard = WHOLE
) -> IntegerWeights:
    """Read a shard's features of one group and convert them, a block of rows at a time.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
        UnsupportedModel: it is too wide for exact products.
    """
    width = group.width
    if width > MAX_WIDTH:
        raise UnsupportedModel(
            f"{checkpoint.name} has layers with {width} inputs, but the private modes support at "
            f"most {MAX_WIDTH}."
        )
    rows = shard.rows_of(group)
    weight_FD = torch.empty(rows.stop - rows.start, width, dtype=torch.int8)
    scale_F = torch.empty(rows.stop - rows.start, dtype=torch.float32)
    for place, floats_ND in read_rows(checkpoint, group, rows, torch.float32):
        weight_FD[place], scale_F[place] = quantize_rows(floats_ND)
    return IntegerWeights(weight_FD, scale_F)


def add_to_digest(
    digest: WeightsDigest, group: LinearGroup, weights: IntegerWeights, shard: Shard = WHOLE
) -> None:
    """Add a shard's features of one group to the digest that both sides compare."""
    names = group.integer_names
    if not shard.is_whole:
        names = group.integer_names_of(shard.rows_of(group))
    weight_name, scale_name = names
    digest.update(weight_name, weights.weight_FD)
    digest.update(scale_name, weights.scale_F)


def quantize_all(
    checkpoint: Checkpoint, progress: Progress = silent, shard: Shard = WHOLE
) -> Iterator[tuple[LinearGroup, IntegerWeights]]:
    """A shard's part of all groups, one group at a time, the output projection last.

    Args:
        progress: called after each group with the bytes done and their total.
    """
    done = Counter(integer_bytes(checkpoint.config, shard), progress)
    for group in linear_groups(checkpoint.config):
        weights = quantize_group(checkpoint, group, shard)
        yield group, weights
        done.add(weights.nbytes)
