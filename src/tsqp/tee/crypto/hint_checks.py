"""The TEE's check of hints [P10]: whether they belong to its weights.

Shape suffixes: N roots; G blocks of features; B features of a block; W features.
"""

import secrets
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra.hints import SEED_BYTES, Polynomials
from tsqp.algebra.modular import multiply
from tsqp.algebra.native import compiled
from tsqp.algebra.params import LATTICE
from tsqp.algebra.residue_blocks import BLOCK, blocks
from tsqp.errors import HintsError
from tsqp.tee.crypto.freivalds import times
from tsqp.tee.crypto.kernels import ALL_ROWS
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool

VECTORS = 2


def check_hints(
    hints: Polynomials, public: Polynomials, weight_FD: Tensor, name: str, row_pool: RowPool
) -> None:
    """[P10]: Σ_f κ_f H_f = Σ_d (κW)_d a_d at every root, for two secret κ, uniform mod q.

    Wrong hints pass with probability q^-2. For hints that were not made here: a mask whose product
    is wrong would give its secret away.

    Args:
        hints: a private copy, which is what is used afterwards.
        name: names the group or model in the error message.
        row_pool: its threads divide the roots among them.

    Raises:
        HintsError: a value is not in [0, q), or not 0 where a block has no feature, or they are not
            the hints of these weights.
    """
    last = hints.count - (hints.low_GNB.shape[0] - 1) * BLOCK  # features in the last block
    if hints.low_GNB[-1, :, last:].any() or hints.high_GNB[-1, :, last:].any():
        raise HintsError(
            f"The hints of {name} hold values where there is no feature: make them again with this "
            "model."
        )
    k_2F = uniform((VECTORS, hints.count), LATTICE)
    kw_2D = times(k_2F, weight_FD, LATTICE)
    found_2N = _combined(hints, k_2F, row_pool)
    if found_2N is None:
        raise HintsError(
            f"The hints of {name} hold values outside [0, q): make them again with this model."
        )
    expected_2N = _combined(public, kw_2D, row_pool)
    if expected_2N is None or not np.array_equal(found_2N, expected_2N):
        raise HintsError(
            f"The hints of {name} are not those of its weights: make them again with this model."
        )


def fresh_seed() -> bytes:
    """A new public seed."""
    return secrets.token_bytes(SEED_BYTES)


def compile_loops() -> None:
    """Compile the loops."""
    _add_up.compile()


def _combined(
    polynomials: Polynomials, k_2W: NDArray[np.int64], row_pool: RowPool
) -> NDArray[np.int64] | None:
    """Σ_w k_w · p_w mod q at every root, for two vectors; None if a value is not in [0, q).

    Args:
        k_2W: for the first W polynomials; the others are not read.
    """
    degree, width = polynomials.low_GNB.shape[1], k_2W.shape[1]
    some_G = slice(blocks(width))
    centred_2W = np.zeros((VECTORS, blocks(width) * BLOCK))
    centred_2W[:, :width] = np.where(k_2W > LATTICE.half, k_2W - LATTICE.p, k_2W)
    total_2N = np.zeros((VECTORS, degree), np.int64)
    low_GNB, high_GNB = polynomials.low_GNB[some_G], polynomials.high_GNB[some_G]
    add_up = partial(_add_up, low_GNB, high_GNB, centred_2W, float(LATTICE.p), total_2N)
    return total_2N if row_pool.run(degree, add_up) == ALL_ROWS else None


@compiled(
    "int64(uint32[:, :, ::1], uint16[:, :, ::1], float64[:, ::1], float64, int64[:, ::1], int64,"
    " int64)"
)
def _add_up(
    low_GNB: NDArray[np.uint32],
    high_GNB: NDArray[np.uint16],
    k_2W: NDArray[np.float64],
    q: float,
    total_2N: NDArray[np.int64],
    first: int,
    stop: int,
) -> int:
    """Add to the sums at some roots; returns one at which a value is not in [0, q), or ALL_ROWS."""
    one_over_q = 1.0 / q
    for g in range(low_GNB.shape[0]):
        k1_B, k2_B = k_2W[0, g * BLOCK : (g + 1) * BLOCK], k_2W[1, g * BLOCK : (g + 1) * BLOCK]
        for n in range(first, stop):
            sum1, sum2 = np.int64(0), np.int64(0)  # of BLOCK products below 2^47
            largest = 0.0
            for b in range(BLOCK):
                value = np.float64(low_GNB[g, n, b]) + np.float64(high_GNB[g, n, b]) * 4294967296.0
                largest = max(largest, value)
                sum1 += np.int64(multiply(value, k1_B[b], k1_B[b] * one_over_q, q))
                sum2 += np.int64(multiply(value, k2_B[b], k2_B[b] * one_over_q, q))
            if largest >= q:
                return n
            total_2N[0, n] = (total_2N[0, n] + sum1) % np.int64(q)
            total_2N[1, n] = (total_2N[1, n] + sum2) % np.int64(q)
    return ALL_ROWS
