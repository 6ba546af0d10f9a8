"""`--field auto`: pads or lattice masks, whichever costs less processor time on this machine.

Both are timed on one square layer of the model's typical width. The samples take some
tenths of a second; compiling the loops of the field that is not chosen takes a few seconds.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
import torch

from tsqp.algebra import residue_bytes
from tsqp.algebra.hints import Polynomials
from tsqp.algebra.params import DEGREE, LATTICE, WIDE, Field
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.lattice import LatticeProvider, rows_of_a_class
from tsqp.tee.crypto.pad_providers import BATCH_ROWS, DirectProvider, PadProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_group import LatticeGroup, Switch
from tsqp.tee.offload.masked import Group, MaskedGroup

Shapes = Mapping[LinearGroup, tuple[int, int]]  # (F, D) of each group

ROUNDS = 3  # the fastest counts
WIDEST_SAMPLE = 2048  # features; its hints and masks take 75 MB, more than most caches hold
WEIGHT = 127  # on the diagonal of the sample; the values do not change the time


@dataclass(frozen=True, slots=True)
class MaskCosts:
    """Processor seconds for one row of every group.

    Attributes:
        pads_s: to make its pads [P4].
        pad_loops_s: to mask it, check the answer and unmask it, with pads.
        lattice_s: to make its lattice masks [P11].
        lattice_loops_s: the same loops with lattice masks.
    """

    pads_s: float
    pad_loops_s: float
    lattice_s: float
    lattice_loops_s: float

    @property
    def lattice_is_cheaper(self) -> bool:
        """Whether the sum is smaller with lattice masks."""
        return self.lattice_s + self.lattice_loops_s < self.pads_s + self.pad_loops_s


def measure_costs(shapes: Shapes, pad_memory: int) -> MaskCosts:
    """Time both on samples.

    Args:
        pad_memory: bytes for the stock, which decide how many rows are made at once [P14].
    """
    width = _typical_width(shapes)
    group = LinearGroup(0, "o", width, width)
    weights = IntegerWeights(WEIGHT * torch.eye(width, dtype=torch.int8), torch.ones(width))
    products = sum(features * width for features, width in shapes.values())
    elements = sum(map(sum, shapes.values()))
    direct = DirectProvider({group: weights.weight_FD}, WIDE)
    pads_s = _making_s(direct, group, BATCH_ROWS) / width**2
    transform = ClassTransform.of(
        Ring.of(LATTICE.p, DEGREE), DEGREE // rows_of_a_class(shapes, pad_memory)
    )
    polynomials = Polynomials.empty(DEGREE, width)
    polynomials.low_GNB[:] = 1  # not the one page of zeros that the system maps everywhere
    polynomials.high_GNB[:] = 1
    lattice = LatticeProvider(polynomials, {group: polynomials}, transform)
    lattice_s = _making_s(lattice, group, transform.rows) / (2 * width)
    lattice.forget()
    return MaskCosts(
        products * pads_s,
        elements * _loops_s(MaskedGroup(group, weights, None, WIDE)),
        elements * lattice_s,
        elements * _loops_s(LatticeGroup(group, weights, None, Switch())),
    )


def _typical_width(shapes: Shapes) -> int:
    """The number of input features that most weights have, but at most WIDEST_SAMPLE."""
    weights: Counter[int] = Counter()
    for features, width in shapes.values():
        weights[width] += features * width
    return min(WIDEST_SAMPLE, weights.most_common(1)[0][0])


def _making_s(provider: PadProvider, group: LinearGroup, rows: int) -> float:
    """Seconds to make one row of a group, of this many that are made at once."""
    pads = Pads.empty(rows, group.width, group.features, provider.field)
    place = list(range(rows))
    return _fastest(lambda: provider.make(group, pads, place)) / rows


def _loops_s(group: Group[Any]) -> float:
    """Seconds to mask, check and unmask one element of the sample, inputs and outputs alike."""
    field, width, row_pool = group.field, group.width, RowPool(1)
    pads = Pads.empty(BATCH_ROWS, width, width, field)
    pads.r_ND[:] = pads.u_NF[:] = 0
    x_TD = torch.arange(BATCH_ROWS * width).view(BATCH_ROWS, width).sin()
    c_TB = torch.empty(BATCH_ROWS, field.residue_bytes * width, dtype=torch.uint8)
    y_TF = torch.empty(BATCH_ROWS, width)
    z_TB = torch.empty_like(c_TB)
    group.mask(x_TD, pads.r_ND, c_TB, row_pool)
    _answer(c_TB, z_TB, field)

    def run() -> None:
        masked = group.mask(x_TD, pads.r_ND, c_TB, row_pool)
        group.check_and_unmask(z_TB, pads.u_NF, masked, y_TF, "The sample", row_pool)

    return _fastest(run) / (BATCH_ROWS * 2 * width)


def _answer(c_TB: torch.Tensor, z_TB: torch.Tensor, field: Field) -> None:
    """The product of the sample."""
    residues = np.empty((len(c_TB), c_TB.shape[1] // field.residue_bytes), field.dtype)
    residue_bytes.unpack(c_TB.numpy(), field, residues)
    answer = residues.astype(np.int64) * WEIGHT % field.p
    residue_bytes.pack(answer.astype(field.dtype), field, z_TB.numpy())


def _fastest(work: Callable[[], None]) -> float:
    work()  # the first call may compile
    times = []
    for _ in range(ROUNDS):
        began = process_time()
        work()
        times.append(process_time() - began)
    return min(times)
