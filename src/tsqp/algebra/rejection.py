"""Random words to uniform residues, by exact rejection."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.params import Field


def accept(words_N: NDArray[Any], bits: int, p: int, residues_N: NDArray[Any]) -> int:
    """Keep the words whose lowest `bits` bits are below p, in order.

    Args:
        words_N: uint32, or uint64 if `residues_N` is int64.
        residues_N: int32 or int64, as long as the words; receives the kept values at its start.

    Returns:
        how many were kept. From uniform words they are uniform on [0, p).
    """
    kernel = _accept if bits < 32 else _accept_long
    return int(kernel(words_N, (1 << bits) - 1, p, residues_N))


def compile_loops(field: Field) -> None:
    """Compile it for residues of this field."""
    (_accept if field.dtype == np.int32 else _accept_long).compile()


@inlined
def _accept_all(words_N: NDArray[Any], mask: Any, p: Any, residues_N: NDArray[Any]) -> int:
    any_rejected = False
    for i in range(words_N.size):
        value = words_N[i] & mask
        any_rejected |= value >= p
        residues_N[i] = value
    if not any_rejected:  # all but one in thousands of calls
        return words_N.size
    kept = 0
    for i in range(words_N.size):
        value = words_N[i] & mask
        if value < p:
            residues_N[kept] = value
            kept += 1
    return kept


@compiled("int64(uint32[::1], uint32, uint32, int32[::1])")
def _accept(words_N: NDArray[Any], mask: int, p: int, residues_N: NDArray[Any]) -> int:
    return _accept_all(words_N, mask, p, residues_N)


@compiled("int64(uint64[::1], uint64, uint64, int64[::1])")
def _accept_long(words_N: NDArray[Any], mask: int, p: int, residues_N: NDArray[Any]) -> int:
    return _accept_all(words_N, mask, p, residues_N)
