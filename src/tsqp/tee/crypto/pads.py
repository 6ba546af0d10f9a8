"""Pads: a mask r with its product u, used for one row and never again. Lattice masks are pads.

Shape suffixes: N rows; D input and F output features of a group; G blocks of features; W words of a
block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled
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

    def taken(self, place: list[int]) -> "Pads":
        """Some rows, in memory of their own, and overwritten here.

        Raises:
            AssertionError: one of them had been overwritten before.
        """
        r_GNW, u_GNW = _as_words(self.r_ND), _as_words(self.u_NF)
        taken = Pads(_like(self.r_ND, len(place)), _like(self.u_NF, len(place)))
        places_N = np.array(place, np.int64)
        any_used = _move_rows(r_GNW, places_N, _as_words(taken.r_ND))
        _move_rows(u_GNW, places_N, _as_words(taken.u_NF))
        if any_used:
            raise AssertionError("A pad was about to be given out twice.")
        return taken

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
        if place is ALL:  # of one call's rows, where each µs counts
            self.r_ND.view(np.int32).fill(USED)
            self.u_NF.view(np.int32).fill(USED)
        else:
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


def compile_stock() -> None:
    """Compile the loop that takes rows out of a stock."""
    _move_rows.compile()


def _like(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Memory for this many rows."""
    return np.empty((*rows.shape[:-2], count, rows.shape[-1]), rows.dtype)


def _as_words(rows: NDArray[Any]) -> NDArray[np.int32]:
    """A view as blocks [G, N, W] of words; rows that are not in blocks are one block."""
    words = rows.view(np.int32)
    return words if words.ndim == 3 else words[None]


@compiled("boolean(int32[:, :, ::1], int64[::1], int32[:, :, ::1])")
def _move_rows(
    from_GNW: NDArray[np.int32], places_N: NDArray[np.int64], to_GNW: NDArray[np.int32]
) -> bool:
    """Copy rows and overwrite them; returns whether the last word of one was overwritten before.

    Whoever reads this memory later should not find what an earlier call was masked with.
    """
    any_used = False
    for g in range(from_GNW.shape[0]):
        for n in range(places_N.size):
            from_W, to_W = from_GNW[g, places_N[n]], to_GNW[g, n]
            for w in range(from_W.size):
                to_W[w] = from_W[w]
                from_W[w] = USED
            any_used |= to_W[to_W.size - 1] == USED  # it holds the highest bits of a residue
    return any_used
