"""`--field auto`: pads or lattice masks, whichever costs less processor time on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import process_time

import numpy as np
import torch

from tsqp.algebra.hints import Polynomials
from tsqp.algebra.params import DEGREE, LATTICE, WIDE
from tsqp.algebra.residue_blocks import BLOCK
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.lattice import LatticeProvider, rows_of_a_class
from tsqp.tee.crypto.pad_providers import BATCH_ROWS, DirectProvider, PadProvider
from tsqp.tee.crypto.pads import Pads

Shapes = Mapping[LinearGroup, tuple[int, int]]  # (F, D) of each group

ROUNDS = 3  # the fastest counts
SAMPLE = 512  # features of the layer whose pads are timed
_GROUP = LinearGroup(0, "o", SAMPLE, SAMPLE)


@dataclass(frozen=True, slots=True)
class MaskCosts:
    """Processor seconds for one row of every group; the loops around a call are not counted.

    Attributes:
        pads_s: to make its pads [P4].
        lattice_s: to make its lattice masks [P11].
    """

    pads_s: float
    lattice_s: float

    @property
    def lattice_is_cheaper(self) -> bool:
        return self.lattice_s < self.pads_s


def measure_costs(shapes: Shapes, pad_memory: int) -> MaskCosts:
    """Time both on samples.

    Args:
        pad_memory: bytes for the stock, which decide how many rows are made at once [P14].
    """
    products = sum(features * width for features, width in shapes.values())
    elements = sum(map(sum, shapes.values()))
    rows = rows_of_a_class(shapes, pad_memory)
    return MaskCosts(products * _product_s(), elements * _element_s(rows))


def _product_s() -> float:
    """Seconds for one weight and one row of a pad, with the random residues of a square layer."""
    weight_FD = torch.full(
        (SAMPLE, SAMPLE), 127, dtype=torch.int8
    )  # the values do not change the time
    provider = DirectProvider({_GROUP: weight_FD}, WIDE)
    fastest = _fastest(provider, Pads.empty(BATCH_ROWS, SAMPLE, SAMPLE, WIDE))
    return fastest / (BATCH_ROWS * SAMPLE * SAMPLE)


def _element_s(rows: int) -> float:
    """Seconds for one element of a class of this many rows, masks and products alike."""
    transform = ClassTransform.of(Ring.of(LATTICE.p, DEGREE), DEGREE // rows)
    polynomials = Polynomials.empty(DEGREE, BLOCK)
    polynomials.low_GNB[:] = np.arange(BLOCK)  # the values do not change the time
    provider = LatticeProvider(polynomials, {_GROUP: polynomials}, transform)
    fastest = _fastest(provider, Pads.empty(rows, BLOCK, BLOCK, LATTICE))
    provider.forget()
    return fastest / (2 * BLOCK * rows)


def _fastest(provider: PadProvider, pads: Pads) -> float:
    place = list(range(len(pads)))
    provider.make(_GROUP, pads, place)  # the first call may compile
    times = []
    for _ in range(ROUNDS):
        began = process_time()
        provider.make(_GROUP, pads, place)
        times.append(process_time() - began)
    return min(times)
