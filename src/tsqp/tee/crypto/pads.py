"""Pads: a mask r with its product u, used for one row and never again. Lattice masks are pads.

Shape suffixes: N rows; D input and F output features of a group; G blocks of features; W words of a
block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.params import LATTICE, Field
from tsqp.algebra.residue_blocks import BLOCK, WORDS, blocks

ALL = slice(None)
USED = -1  # overwrites a row that was given out; no residue has every bit set


@dataclass(frozen=True, slots=True)
class Pads:
    """Rows of one group.

    They are int32 residues, or in the lattice field blocks of them, [G, N, W], as
    `tsqp.algebra.residue_blocks` has them.

    Attributes:
        r_ND: on [0, p): uniform, or a lattice mask.
        u_NF: Wq · r mod p; for a lattice mask, without the small Wq · e.
    """

    r_ND: NDArray[Any]
    u_NF: NDArray[Any]

    @classmethod
    def empty(cls, rows: int, width: int, features: int, field: Field) -> "Pads":
        """Memory for rows, with nothing in it yet."""
        return cls(empty_rows(rows, width, field), empty_rows(rows, features, field))

    @classmethod
    def joined(cls, parts: Sequence["Pads"]) -> "Pads":
        """All rows of some pads, one after the other; several pads are wiped."""
        if len(parts) == 1:
            return parts[0]
        r_ND = np.concatenate([part.r_ND for part in parts], axis=-2)
        joined = cls(r_ND, np.concatenate([part.u_NF for part in parts], axis=-2))
        for part in parts:
            part.wipe()
        return joined

    def __len__(self) -> int:
        return int(self.r_ND.shape[-2])

    def copy(self, place: list[int] | slice) -> "Pads":
        """Some rows, in memory of their own."""
        return Pads(self.r_ND[..., place, :].copy(), self.u_NF[..., place, :].copy())

    def products(self, columns: slice) -> NDArray[Any]:
        """u of some output features, contiguous. In the lattice field they begin with a block."""
        if self.u_NF.ndim == 3:
            assert columns.start % BLOCK == 0
            return self.u_NF[columns.start // BLOCK : blocks(columns.stop)]
        return np.ascontiguousarray(self.u_NF[:, columns])

    def put(self, place: list[int] | slice, pads: "Pads") -> None:
        """Write rows."""
        self.r_ND[..., place, :], self.u_NF[..., place, :] = pads.r_ND, pads.u_NF

    def wipe(self, place: list[int] | slice = ALL) -> None:
        """Overwrite rows that must not be found again.

        Whoever finds one row of u of a lattice mask can solve for the secret of all its rows.
        """
        self.r_ND[..., place, :] = self.u_NF[..., place, :] = self._used

    @property
    def any_used(self) -> bool:
        """Whether a row was wiped."""
        return bool((self.r_ND[..., -1] == self._used).any())  # the highest bits of a residue

    @property
    def nbytes(self) -> int:
        return int(self.r_ND.nbytes + self.u_NF.nbytes)

    @property
    def _used(self) -> Any:
        return np.array(USED).astype(self.r_ND.dtype)


def empty_rows(rows: int, residues: int, field: Field) -> NDArray[Any]:
    """Memory for rows of masks, or of their products, with nothing in it yet."""
    if field is LATTICE:
        return np.empty((blocks(residues), rows, WORDS), np.uint32)
    return np.empty((rows, residues), np.int32)


def row_bytes_in_stock(field: Field, *residues: int) -> int:
    """Bytes of rows with this many residues in `empty_rows`."""
    if field is LATTICE:
        return sum(4 * WORDS * blocks(each) for each in residues)
    return 4 * sum(residues)
