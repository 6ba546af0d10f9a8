"""A masked layer in exact Python arithmetic, to compare with, and a test of evenness."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mask_blocks import from_blocks, to_blocks
from tsqp.algebra import residue_bytes
from tsqp.algebra.params import CHECK_MODULUS, LATTICE, WIDE, Field
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pad_providers import PadProvider
from tsqp.tee.crypto.pads import Pads, row_bytes_in_stock
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import Masked, MaskedGroup

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Kind:
    """What differs between the two providers of pads.

    Attributes:
        unit: rows that are always made together.
    """

    field: Field
    unit: int

    def bytes_of(self, *residues: int) -> int:
        """In stock."""
        return row_bytes_in_stock(self.field, *residues)

    def rows(self, numbers: Int32, residues: int) -> NDArray[Any]:
        """Rows of one number each."""
        repeated = np.repeat(numbers[:, None].astype(np.int64), residues, 1)
        return to_blocks(repeated) if self.field is LATTICE else repeated.astype(np.int32)

    def numbers(self, rows: NDArray[Any], residues: int) -> list[list[int]]:
        """The residues of rows."""
        if self.field is LATTICE:
            rows = from_blocks(rows, residues)
        return rows.tolist()  # type: ignore[no-any-return]


DIRECT, IN_CLASSES = Kind(WIDE, 1), Kind(LATTICE, 4)
KINDS = pytest.mark.parametrize("kind", [DIRECT, IN_CLASSES], ids=lambda kind: kind.field.name)


class NumberingProvider:
    """A fake for tests: each row holds a number of its own instead of secrets."""

    def __init__(
        self,
        kind: Kind,
        shapes: Mapping[LinearGroup, tuple[int, int]],
        *,
        first: int = 0,
        fails_every: int = 0,
    ) -> None:
        self.field, self.unit = kind.field, kind.unit
        self.next = first
        self.forgotten = 0
        self._kind = kind
        self._shapes = shapes
        self._lock = threading.Lock()
        self._calls = 0
        self._fails_every = fails_every

    def stock_rows(self, memory_rows: int) -> int:
        whole = memory_rows - memory_rows % self.unit
        return whole if self.unit == 1 else max(self.unit, whole)

    def batch_rows(self, key: LinearGroup, room: int, memory_rows: int) -> int:
        if self.unit > 1:
            return self.unit if room >= self.unit else 0
        return min(room, max(1, memory_rows // 4))

    def rows_made(self, key: LinearGroup, rows: int) -> int:
        return rows if self.unit == 1 else self.unit

    def make(self, key: LinearGroup, pads: Pads, place: list[int]) -> None:
        rows, (features, width) = len(place), self._shapes[key]
        with self._lock:
            self._calls += 1
            if self._fails_every and self._calls % self._fails_every == 0:
                raise MemoryError("the provider fails, as it does now and then")
            first, self.next = self.next, self.next + rows
        numbers = np.arange(first, first + rows, dtype=np.int32)
        made = Pads(self._kind.rows(numbers, width), self._kind.rows(numbers, features))
        pads.put(place, made)

    def forget(self) -> None:
        self.forgotten += 1


def make(provider: PadProvider, key: LinearGroup, shape: tuple[int, int], rows: int = 1) -> Pads:
    """As many pads as the provider makes for somebody who waits for `rows`."""
    features, width = shape
    made = provider.rows_made(key, rows)
    pads = Pads.empty(made, width, features, provider.field)
    provider.make(key, pads, list(range(made)))
    return pads


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


class Layer:
    """A masked group with an honest worker in exact arithmetic."""

    def __init__(
        self,
        field: Field,
        features: int = 12,
        width: int = 37,
        *,
        weights: IntegerWeights | None = None,
        threads: int = 2,
    ) -> None:
        self.weights = integer_weights(features, width) if weights is None else weights
        self.field = field
        linear = LinearGroup(3, "qkv", *self.weights.weight_FD.shape)
        self.group = MaskedGroup(linear, self.weights, None, field)
        self.rows = RowPool(threads)

    def pads(self, rows: int) -> tuple[Int32, Int32]:
        r_TD = uniform((rows, self.group.width), self.field)
        return r_TD, self.product(r_TD)

    def mask(self, x_TD: torch.Tensor, r_TD: Int32) -> tuple[Masked, Int32]:
        """What the TEE keeps, and the residues that go out."""
        c_TB = torch.empty(len(x_TD), self.field.residue_bytes * self.group.width).byte()
        masked = self.group.mask(x_TD, r_TD, c_TB, self.rows)
        c_TD = np.empty(tuple(x_TD.shape), np.int32)
        residue_bytes.unpack(c_TB.numpy(), self.field, c_TD)
        return masked, c_TD

    def product(self, c_TD: Int32) -> Int32:
        """Wq · c mod p."""
        z_TF = [
            [v % self.field.p for v in product(self.weights.weight_FD, row)]
            for row in c_TD.tolist()
        ]
        return np.array(z_TF, np.int32)

    def answer(self, c_TD: Int32) -> torch.Tensor:
        """Wq · c mod p as bytes."""
        return self.to_bytes(self.product(c_TD))

    def to_bytes(self, z_TF: Int32) -> torch.Tensor:
        z_TB = torch.empty(len(z_TF), self.field.residue_bytes * z_TF.shape[1]).byte()
        residue_bytes.pack(z_TF, self.field, z_TB.numpy())
        return z_TB

    def unmask(self, z_TB: torch.Tensor, u_TF: Int32, masked: Masked) -> torch.Tensor:
        y_TF = torch.empty(len(z_TB), self.group.features)
        self.group.check_and_unmask(z_TB, u_TF, masked, y_TF, "The worker", self.rows)
        return y_TF


def chi_square_p(counts: np.ndarray) -> float:
    """The probability of counts at least as uneven, where all bins are alike."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(counts.size - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def rows_of_every_kind(width: int) -> torch.Tensor:
    """Normal rows, zeros, one huge entry, tiny and huge numbers, alternating signs."""
    x_TD = torch.randn(40, width, generator=torch.Generator().manual_seed(7))
    x_TD[1] = 0
    x_TD[2] = 0
    x_TD[2, 5] = 1e20
    x_TD[3] *= 1e-42
    x_TD[4] *= 1e20
    x_TD[5] = torch.tensor([1.0, -1.0]).repeat(width)[:width] * 3e38
    x_TD[6, 0] = 1e6
    return x_TD
