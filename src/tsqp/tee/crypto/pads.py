"""What a pad is: r with its product u, used for one row and never again. Lattice masks are pads.

Shape suffixes: N rows; D input and F output features of a group; B bytes of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.params import LATTICE, Field

USED = -1  # every bit is set, as in no residue: what lies in the place of a row that was given out


@dataclass(frozen=True, slots=True)
class Pads:
    """Rows of one group: int32 residues, or in the lattice field rows of bytes (`residue_bytes`).

    Attributes:
        r_ND: on [0, p): uniform, or a lattice mask.
        u_NF: Wq · r mod p; of a lattice mask, but for the small Wq · e.
    """

    r_ND: NDArray[Any]
    u_NF: NDArray[Any]

    def __len__(self) -> int:
        return len(self.r_ND)

    def __getitem__(self, rows: slice) -> "Pads":
        return Pads(self.r_ND[rows], self.u_NF[rows])

    @property
    def nbytes(self) -> int:
        return int(self.r_ND.nbytes + self.u_NF.nbytes)


def empty_rows(rows: int, residues: int, field: Field) -> NDArray[Any]:
    """Memory for rows of masks, or of their products, with nothing in it yet."""
    if field is LATTICE:
        return np.empty((rows, field.residue_bytes * residues), np.uint8)
    return np.empty((rows, residues), np.int32)


def residue_bytes_in_stock(field: Field) -> int:
    """Of one residue in `empty_rows`."""
    return field.residue_bytes if field is LATTICE else 4


def wipe(pads: Pads, place: list[int] | slice) -> None:
    """Overwrite rows that must not be found again."""
    pads.r_ND[place] = pads.u_NF[place] = used_mark(pads.r_ND)


def used_mark(rows: NDArray[Any]) -> Any:
    """The number that `wipe` writes, in the type of these rows."""
    return np.array(USED).astype(rows.dtype)
