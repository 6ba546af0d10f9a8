"""The public half of lattice masks: the polynomials a_d, and the hints of a group [P10].

Both are held as their values at the roots of the ring, in blocks of features, since that is how the
transform reads them. Shape suffixes: N roots; G blocks of features; B features of a block; D input
and F output features; W either of them.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import LATTICE
from tsqp.algebra.residue_blocks import BLOCK
from tsqp.algebra.ring import Ring

SEED_BYTES = 32
LABEL = b"TSQP lattice masks: public polynomials, version 1"
SPARE = 16  # candidates beyond N; more are needed with probability below 2^-250
ROWS = 256  # roots whose values are multiplied at once, at most
PRODUCT_BYTES = 2**26  # at most for their products, which take 4 bytes for each digit, and then 8


@dataclass(frozen=True, slots=True)
class Polynomials:
    """Elements of R_q by their values at the N roots, each in [0, q).

    Attributes:
        low_GNB, high_GNB: the lower 32 and the upper 16 bits; zeros after the last feature.
        count: how many there are.
    """

    low_GNB: NDArray[np.uint32]
    high_GNB: NDArray[np.uint16]
    count: int

    @classmethod
    def empty(cls, degree: int, count: int) -> "Polynomials":
        shape = (-(-count // BLOCK), degree, BLOCK)
        return cls(np.zeros(shape, np.uint32), np.zeros(shape, np.uint16), count)

    @property
    def nbytes(self) -> int:
        return self.low_GNB.nbytes + self.high_GNB.nbytes

    def put(self, first_root: int, values_NW: NDArray[np.int64]) -> None:
        """Store the values of all polynomials at some consecutive roots."""
        rows = slice(first_root, first_root + len(values_NW))
        for g in range(len(self.low_GNB)):
            some_NB = values_NW[:, g * BLOCK : (g + 1) * BLOCK]
            width = some_NB.shape[1]
            self.low_GNB[g, rows, :width] = some_NB & 0xFFFFFFFF
            self.high_GNB[g, rows, :width] = some_NB >> 32

    def at(self, rows: slice) -> NDArray[np.int64]:
        """The values of all polynomials at some roots, int64 [N, count]."""
        values_GNB = self.high_GNB[:, rows].astype(np.int64) << 32
        values_GNB |= self.low_GNB[:, rows]
        blocks, roots, _ = values_GNB.shape
        flat = values_GNB.transpose(1, 0, 2).reshape(roots, blocks * BLOCK)
        return np.ascontiguousarray(flat[:, : self.count])


def public_polynomials(ring: Ring, seed: bytes, count: int, *, label: bytes = LABEL) -> Polynomials:
    """a_d for d < count, expanded from a public seed, which must not be somebody else's choice.

    The values of a_d at the roots are the 48-bit little-endian words of SHAKE128(label, N, q, seed,
    d), cut to the bits of q, without those that are q or larger. Whoever chooses the seed cannot
    choose the polynomials.
    """
    assert len(seed) == SEED_BYTES
    found = Polynomials.empty(ring.degree, count)
    head = len(label).to_bytes(8, "little") + label
    head += ring.degree.to_bytes(8, "little") + ring.q.to_bytes(8, "little") + seed
    for d in range(count):
        values_N = _expand(head + d.to_bytes(8, "little"), ring)
        found.low_GNB[d // BLOCK, :, d % BLOCK] = values_N & 0xFFFFFFFF
        found.high_GNB[d // BLOCK, :, d % BLOCK] = values_N >> 32
    return found


def _expand(message: bytes, ring: Ring) -> NDArray[np.int64]:
    mask = (1 << ring.q.bit_length()) - 1
    candidates = ring.degree + SPARE
    while True:
        raw = np.frombuffer(hashlib.shake_128(message).digest(6 * candidates), "<u2")
        words = raw.reshape(-1, 3).astype(np.int64)
        values = (words[:, 0] | words[:, 1] << 16 | words[:, 2] << 32) & mask
        values = values[values < ring.q]
        if len(values) >= ring.degree:
            return values[: ring.degree]
        candidates *= 2


def make_hints(public: Polynomials, weight_FD: Tensor) -> Polynomials:
    """H_f = Σ_d Wq_fd · a_d for a group of D inputs, exact.

    Args:
        public: a_d for at least D features.
        weight_FD: int8 in [-127, 127].
    """
    features, width = weight_FD.shape
    degree = public.low_GNB.shape[1]
    hints = Polynomials.empty(degree, features)
    rows = max(1, min(ROWS, PRODUCT_BYTES // ((4 * LATTICE.digits + 8) * features)))
    for first in range(0, degree, rows):
        a_ND = public.at(slice(first, first + rows))[:, :width]
        h_NF = torch.empty(len(a_ND), features, dtype=torch.int64)
        a_ND = np.ascontiguousarray(a_ND)
        residue_product(torch.from_numpy(a_ND), weight_FD, LATTICE, h_NF)
        hints.put(first, h_NF.numpy())
    return hints
