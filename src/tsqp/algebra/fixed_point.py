"""Weights and activations as integers, so that products of them never overflow mod p.

Shape suffixes: D input and F output features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.algebra.params import LATTICE, Field

MIN_LEVELS = 2**6  # of a typical row's activations; below, the answer would be mostly rounding
TINY = 2.0**-100  # a row of smaller weights counts as zeros
ROUNDING_MARGIN = 2.0**-30  # for the float64 arithmetic of the scale
BLOCK_ELEMENTS = 2**18  # worked on at once, to bound the memory of temporaries


def quantize_rows(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """[P1]: int8 weights in [-127, 127] and a float32 scale for each output row.

    Args:
        weight_FD: float32 and finite, on the CPU, so that the division is IEEE's everywhere.
    """
    features, width = weight_FD.shape
    integers_FD = torch.empty(features, width, dtype=torch.int8)
    scale_F = torch.empty(features, dtype=torch.float32)
    for rows in row_blocks(features, width):
        block = weight_FD[rows]
        largest = block.abs().amax(dim=1)
        tiny = largest < TINY
        scale = torch.where(tiny, 1.0, largest / 127)
        rounded = (block / scale[:, None]).round_().clamp_(-127, 127)
        rounded[tiny] = 0
        integers_FD[rows], scale_F[rows] = rounded.to(torch.int8), scale
    return integers_FD, scale_F


def are_quantized_rows(integers_FD: Tensor, scale_F: Tensor) -> bool:
    """Whether `quantize_rows` can have made these integers and scales [P1].

    The largest entry of a row is 127 or -127, unless the row is zero and its scale is 1.

    Args:
        integers_FD: int8.
        scale_F: float32.
    """
    if integers_FD.shape[1] == 0:
        return False
    largest_F = torch.maximum(integers_FD.amax(dim=1).short(), -integers_FD.amin(dim=1).short())
    is_zero_F = largest_F == 0
    lowest, highest = torch.tensor([TINY, torch.finfo(torch.float32).max]) / 127
    is_scale_F = (scale_F >= lowest) & (scale_F <= highest)  # NaN is not
    right_F = torch.where(is_zero_F, scale_F == 1, (largest_F == 127) & is_scale_F)
    return bool(right_F.all())


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large |Wq · x| can get: exact properties of a group's integer weights [P2].

    Attributes:
        l1: max over output rows of the sum of |Wq|.
        l2_squared: max over output rows of the sum of Wq².
        width: D.
    """

    l1: int
    l2_squared: int
    width: int

    @classmethod
    def of(cls, integers_FD: Tensor) -> "Bounds":
        features, width = integers_FD.shape
        l1 = l2_squared = 0
        for rows in row_blocks(features, width):
            block = integers_FD[rows].to(torch.int32)
            l1 = max(l1, int(block.abs().sum(dim=1, dtype=torch.int64).max()))
            l2_squared = max(l2_squared, int(block.square().sum(dim=1, dtype=torch.int64).max()))
        return cls(l1, l2_squared, width)

    def delta(self, field: Field) -> int:
        """Δ of [P12], what the integers of the activations are multiplied by; 1 without noise.

        A power of two. |Wq · e| reaches Δ/2 with probability below 2^-70, and products fit int32.
        """
        if field is not LATTICE:
            return 1
        wanted = max(20 * math.sqrt(8 * self.l2_squared), field.p / 2**31)
        return 1 << math.ceil(math.log2(wanted))

    def room(self, field: Field) -> float:
        """The limit of |Wq · xq| before rounding [P2], [P12]; divided by its bound, the scale.

        Raises:
            ValueError: the field is too small for these weights; the message says what it keeps.
        """
        delta = self.delta(field)
        largest = field.half - (delta // 2)  # of Δ · Wq · xq
        if 2 * largest <= self.l1 * delta:
            raise ValueError(
                f"a row's weights add up to {self.l1}, but the field ends at {largest}"
            )
        room = (1 - ROUNDING_MARGIN) * (largest / delta - self.l1 / 2)
        if (levels := self._typical_levels(room)) < MIN_LEVELS:
            raise ValueError(
                f"a typical row of {self.width} activations would keep {levels:.0f} levels, but "
                f"{MIN_LEVELS} are needed"
            )
        return room

    def _typical_levels(self, room: float) -> float:
        """Integers between the smallest and the largest entry of a row of normal values."""
        if self.l2_squared == 0:
            return math.inf
        deviation = room / math.sqrt(self.l2_squared * self.width)
        return 2 * deviation * math.sqrt(2 * math.log(max(self.width, 2))) + 1


def row_blocks(rows: int, width: int, first: int = 0) -> list[slice]:
    """Blocks of a matrix's rows from `first` on, of at most BLOCK_ELEMENTS elements or one row."""
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    return [slice(start, min(start + step, rows)) for start in range(first, rows, step)]
