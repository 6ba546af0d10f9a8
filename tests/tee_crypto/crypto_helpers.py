"""A masked layer in exact Python arithmetic, to compare with."""

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from tsqp.algebra.params import CHECK_MODULUS, Field
from tsqp.model.quantize import IntegerWeights

Int32 = NDArray[np.int32]


def integer_weights(features: int, width: int, seed: int = 0) -> IntegerWeights:
    generator = torch.Generator().manual_seed(seed)
    weight_FD = torch.randint(-127, 128, (features, width), generator=generator, dtype=torch.int8)
    weight_FD[:, 0] = 127  # as quantised rows have somewhere
    scale_F = torch.rand(features, generator=generator) + 0.5
    return IntegerWeights(weight_FD, scale_F)


def exact_integers(x_D: list[float], weight_FD: torch.Tensor, field: Field) -> list[int]:
    """[P2] with float64 for the scale, as it says, and fractions for the rounding."""
    rows = weight_FD.long()
    l1 = int(rows.abs().sum(1).max())
    l2 = math.sqrt(int(rows.square().sum(1).max()))
    squares = math.fsum(v * v for v in x_D)
    bound = min(l1 * max(map(abs, x_D)), l2 * math.sqrt(squares))
    if bound == 0:
        return [0] * len(x_D)
    room = (1 - 2.0**-30) * (field.p - 1 - l1) / 2
    return [round(Fraction(v * (room / bound))) for v in x_D]


def product(weight_FD: torch.Tensor, x_D: list[int]) -> list[int]:
    return [sum(w * x for w, x in zip(row, x_D, strict=True)) for row in weight_FD.tolist()]


def centred(values: list[int], field: Field) -> list[int]:
    return [v - field.p if v > field.half else v for v in (value % field.p for value in values)]


def check_product(k_F: Int32, weight_FD: torch.Tensor) -> list[int]:
    columns = weight_FD.t().tolist()
    return [
        sum(k * w for k, w in zip(k_F.tolist(), column, strict=True)) % CHECK_MODULUS
        for column in columns
    ]
