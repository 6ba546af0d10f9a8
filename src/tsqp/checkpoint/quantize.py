"""The integer weights of the private modes, the same on both sides [P1].

Shape suffixes: F output and D input features of a group; N rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.algebra.fixed_point import quantize_rows
from tsqp.algebra.params import MAX_WIDTH
from tsqp.checkpoint.blocks import read_blocks
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.errors import UnsupportedModel
from tsqp.model.config import ModelConfig, linear_groups
from tsqp.model.linear_group import LinearGroup


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


def integer_bytes(config: ModelConfig) -> int:
    """Bytes of all integer weights and scales."""
    return sum(group.features * (group.width + 4) for group in linear_groups(config))


def quantize_group(checkpoint: Checkpoint, group: LinearGroup) -> IntegerWeights:
    """Read one group and convert it, a block of rows at a time.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
        UnsupportedModel: it is too wide for exact products.
    """
    features, width = group.shape
    if width > MAX_WIDTH:
        raise UnsupportedModel(
            f"{checkpoint.name} has layers with {width} inputs, but the private modes support at "
            f"most {MAX_WIDTH}."
        )
    weight_FD = torch.empty(features, width, dtype=torch.int8)
    scale_F = torch.empty(features, dtype=torch.float32)
    start = 0
    for part in group.parts:
        name = f"{part.name}.weight"
        shape = part.out_features, width
        for rows, floats_ND in read_blocks(checkpoint, name, shape, torch.float32):
            place = slice(start + rows.start, start + rows.stop)
            weight_FD[place], scale_F[place] = quantize_rows(floats_ND)
        start += part.out_features
    return IntegerWeights(weight_FD, scale_F)


def add_to_digest(digest: WeightsDigest, group: LinearGroup, weights: IntegerWeights) -> None:
    """Add one group to the digest that both sides compare."""
    weight_name, scale_name = group.integer_names
    digest.update(weight_name, weights.weight_FD)
    digest.update(scale_name, weights.scale_F)


def quantize_all(
    checkpoint: Checkpoint, progress: Progress = silent
) -> Iterator[tuple[LinearGroup, IntegerWeights]]:
    """All groups of a model, one at a time, the output projection last.

    Args:
        progress: called after each group with the bytes done and their total.
    """
    done = Counter(integer_bytes(checkpoint.config), progress)
    for group in linear_groups(checkpoint.config):
        weights = quantize_group(checkpoint, group)
        yield group, weights
        done.add(weights.nbytes)
