"""Random words to uniform residues, by exact rejection."""

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled


def accept(words_N: NDArray[np.uint32], bits: int, p: int, residues_N: NDArray[np.int32]) -> int:
    """Keep the words whose lowest `bits` bits are below p, in order.

    Args:
        residues_N: as long as the words; receives the kept values at its start.

    Returns:
        how many were kept. From uniform words they are uniform on [0, p).
    """
    return int(_accept(words_N, (1 << bits) - 1, p, residues_N))


def prepare() -> None:
    """Compile it."""
    _accept.compile()


@compiled("int64(uint32[::1], uint32, uint32, int32[::1])")
def _accept(words_N: NDArray[np.uint32], mask: int, p: int, residues_N: NDArray[np.int32]) -> int:
    any_rejected = False
    for i in range(words_N.size):
        value = words_N[i] & mask
        any_rejected |= value >= p
        residues_N[i] = np.int32(value)
    if not any_rejected:  # all but one in thousands of calls
        return words_N.size
    kept = 0
    for i in range(words_N.size):
        value = words_N[i] & mask
        if value < p:
            residues_N[kept] = np.int32(value)
            kept += 1
    return kept
