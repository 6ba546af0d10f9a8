"""Residues of lattice masks in memory: blocks of 32, each of 48 words of 32 bits.

A block is the low 32 bits of its residues, and then the upper 16 bits of each. The transform makes
a block at a time, which lies in one place of memory. The last block of a row is filled up with
residues that mean nothing.

Shape suffixes: G blocks; N rows; W words of a block; H halves of words.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import inlined

BLOCK = 32  # residues: one row of them, in float64, is four vectors of 64 bytes
WORDS = BLOCK + BLOCK // 2  # of a block

UInt32 = NDArray[np.uint32]
UInt16 = NDArray[np.uint16]


def blocks(residues: int) -> int:
    """How many blocks hold this many residues."""
    return -(-residues // BLOCK)


def halves(words_GNW: UInt32) -> UInt16:
    """The same memory as [G, N, H]; the upper bits of residue b are in half 2 · BLOCK + b."""
    return words_GNW.view("<u2")


@inlined
def residue(low: int, high: int) -> Any:
    """A residue from its two parts, in float64."""
    return np.float64(low) + np.float64(high) * 4294967296.0
