"""Residues to and from the blocks of lattice masks, in numpy.

Shape suffixes: G blocks; N rows; W words of a block; B residues of a block; D residues of a row.
"""

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.residue_blocks import BLOCK, WORDS, UInt32, blocks, halves


def to_blocks(residues_ND: NDArray[np.int64]) -> UInt32:
    """[G, N, W] from residues in [0, 2^48)."""
    rows, width = residues_ND.shape
    padded_ND = np.pad(residues_ND, ((0, 0), (0, blocks(width) * BLOCK - width)))
    values_GNB = padded_ND.reshape(rows, blocks(width), BLOCK).transpose(1, 0, 2)
    words_GNW = np.empty((blocks(width), rows, WORDS), np.uint32)
    words_GNW[..., :BLOCK] = values_GNB & 0xFFFFFFFF
    halves(words_GNW)[..., 2 * BLOCK :] = values_GNB >> 32
    return words_GNW


def from_blocks(words_GNW: UInt32, width: int) -> NDArray[np.int64]:
    """The first `width` residues of each row, [N, D]."""
    high_GNB = halves(words_GNW)[..., 2 * BLOCK :].astype(np.int64)
    values_NGB = (words_GNW[..., :BLOCK] | high_GNB << 32).transpose(1, 0, 2)
    rows_ND = values_NGB.reshape(words_GNW.shape[1], len(words_GNW) * BLOCK)
    return np.ascontiguousarray(rows_ND[:, :width])
