"""The loops of a linear layer under lattice masks: one over the input, two over the answer.

The answer is checked as it crossed, every row of it, before any of it is unmasked [P13]: a check
after the rounding would tell a worker, by its errors, about the noise. Both sides of that check are
public, except for the check vectors. Answers are copied into private memory before use.

Shape suffixes: T tokens; K of them that are kept; D input and F output features; P pairs of
features; B bytes of a row, as `residue_bytes` has them; G blocks of features, W words and H halves
of words of a block, as `residue_blocks` has them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.params import CHECK_MODULUS
from tsqp.algebra.residue_blocks import BLOCK, halves
from tsqp.algebra.residue_bytes import Bytes, high_words, low_words
from tsqp.tee.crypto.kernels import ALL_ROWS, fold, high_of, low_of, quantize_row, rows_to_keep

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt16 = NDArray[np.uint16]
UInt32 = NDArray[np.uint32]

HALF_BITS = 23  # of a residue, which has 46
HALF = (1 << HALF_BITS) - 1
SUM = 2**14  # pairs of products of halves, each below 2^46, that are added up at once


def as_halves(k_2N: Int64) -> Int32:
    """[2, 2, N]: of two rows of residues the lower 23 bits, and the upper ones."""
    return np.stack([k_2N & HALF, k_2N >> HALF_BITS], axis=1).astype(np.int32)


def compile_loops() -> None:
    """Compile the loops."""
    for kernel in (_quantize_and_mask, _check_inputs, _verify, _unmask):
        kernel.compile()


@inlined
def _residue(low: Any, high: Any) -> Any:
    return np.int64(low) | np.int64(high) << np.int64(32)


@inlined
def _canonical(value: Any, q: int) -> Any:
    """The residue in [0, q), for value in [-q, q)."""
    return value + q if value < 0 else value


@inlined
def _shift(value: Any, q: int) -> Any:
    """value · 2^23 mod q, for value in [0, q)."""
    return ((value << np.int64(16)) % q << np.int64(7)) % q


@inlined
def _two_dots(k_22D: Int32, c_D: Int64, q: int) -> tuple[Any, Any]:
    """k_i · c mod q, in [0, q), for c in [0, q).

    Products of halves need one multiplication of 32 bits each; their sums are exact in any order.
    """
    first_sum, second_sum = np.int64(0), np.int64(0)
    for first in range(0, k_22D.shape[2], SUM):
        k1_low_D, k1_high_D = k_22D[0, 0][first : first + SUM], k_22D[0, 1][first : first + SUM]
        k2_low_D, k2_high_D = k_22D[1, 0][first : first + SUM], k_22D[1, 1][first : first + SUM]
        some_D = c_D[first : first + SUM]
        low1, middle1, high1 = np.int64(0), np.int64(0), np.int64(0)
        low2, middle2, high2 = np.int64(0), np.int64(0), np.int64(0)
        for i in range(k1_low_D.size):
            c_low, c_high = some_D[i] & HALF, (some_D[i] >> HALF_BITS) & HALF
            low1 += np.int64(k1_low_D[i]) * c_low
            middle1 += np.int64(k1_low_D[i]) * c_high + np.int64(k1_high_D[i]) * c_low
            high1 += np.int64(k1_high_D[i]) * c_high
            low2 += np.int64(k2_low_D[i]) * c_low
            middle2 += np.int64(k2_low_D[i]) * c_high + np.int64(k2_high_D[i]) * c_low
            high2 += np.int64(k2_high_D[i]) * c_high
        first_sum += _shift((_shift(high1 % q, q) + middle1 % q) % q, q) + low1 % q
        second_sum += _shift((_shift(high2 % q, q) + middle2 % q) % q, q) + low2 % q
    return first_sum % q, second_sum % q


@inlined
def _dot_of_pairs(k_P: Int64, xq_P: Int64) -> Any:
    """k · xq mod P of [P7], for k in [0, P) and |xq| < 2^31, of the length of k."""
    total = np.int64(0)
    for i in range(k_P.size):
        total += fold(low_of(k_P[i]) * low_of(xq_P[i]) + high_of(k_P[i]) * high_of(xq_P[i]))
    return total % CHECK_MODULUS


def quantize_and_mask(
    x_TD: Float32,
    r_GTW: UInt32,
    kw_22D: Sequence[Int32],
    after_P: Sequence[Int64],
    l1: float,
    l2: float,
    room: float,
    delta_bits: int,
    q: int,
    c_TB: Bytes,
    unit_T: Float64,
    expected_T2: Sequence[Int64],
    expected_after_T: Sequence[Int64],
    first: int,
    stop: int,
) -> int:
    """[P12] and the right sides of [P13] and [P7]: c = Δ · round(x · a) + r mod q.

    Args:
        r_GTW: the mask, in [0, q).
        kw_22D: k_iW mod q, `as_halves`, of each shard that gets c.
        after_P: the same of kW mod P of the check after rounding, as pairs.
        l1, l2, room: the bounds of the group's weights, and what they leave [P2], [P12].
        delta_bits: log2 Δ; |Δ · xq| < q.
        c_TB: shared memory; receives finished rows of c only.
        unit_T: receives 1/a; 0 for a row of zeros.
        expected_T2: for each shard, receives k_iW · c mod q.
        expected_after_T: for each shard, receives kW · xq mod P.
        first, stop: the rows to do.

    Returns:
        the first row with NaN or Inf, or ALL_ROWS. Rows from there on are to be discarded.
    """
    padded = len(r_GTW) * BLOCK
    kept, step = rows_to_keep(len(kw_22D), stop - first)
    xq_KP, c_KD = np.zeros((kept, padded // 2), np.int64), np.empty((kept, padded), np.int64)
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        fault = _quantize_and_mask(
            x_TD,
            x_TD.view(np.int32),
            r_GTW,
            halves(r_GTW),
            kw_22D[0],
            after_P[0],
            l1,
            l2,
            room,
            delta_bits,
            q,
            c_TB,
            unit_T,
            expected_T2[0],
            expected_after_T[0],
            begin,
            end,
            xq_KP,
            xq_KP.view(np.int32),
            c_KD,
        )
        if fault != ALL_ROWS:
            return int(fault)
        others = zip(kw_22D, after_P, expected_T2, expected_after_T, strict=True)
        for kw, after, expected, expected_after in list(others)[1:]:
            _check_inputs(kw, after, q, expected, expected_after, begin, end, xq_KP, c_KD)
    return ALL_ROWS


def verify(
    z_TB: Bytes,
    k_22F: Int32,
    expected_T2: Int64,
    q: int,
    z_TF: Int64,
    first: int,
    stop: int,
) -> int:
    """[P13]: copy the answer into private memory, and check it there: k_i · z ≡ k_iW · c (mod q).

    Args:
        z_TB: shared memory, each element read once.
        k_22F: the check vectors mod q, `as_halves`.
        z_TF: private memory; receives the answer, and zeros up to whole blocks of features.
        first, stop: the rows to do.

    Returns:
        the first row that holds a value outside [0, q) or fails the check, or ALL_ROWS.
    """
    return int(_verify(z_TB, k_22F, expected_T2, q, z_TF, first, stop))


def unmask(
    z_TF: Int64,
    u_GTW: UInt32,
    after_P: Int64,
    scale_F: Float64,
    unit_T: Float64,
    expected_after_T: Int64,
    q: int,
    delta_bits: int,
    y_TF: Float32,
    first: int,
    stop: int,
) -> int:
    """[P12], [P3]: yq = (centre(z - u mod q) + Δ/2) >> log2 Δ, y = yq · s / a; then one check [P7].

    For answers that `verify` has accepted, all rows of them.

    Args:
        z_TF: private memory, from `verify`.
        u_GTW: the mask's product, in [0, q).
        after_P: the check vector mod P, as pairs.
        y_TF: private memory. Worthless unless ALL_ROWS is returned.
        first, stop: the rows to do.

    Returns:
        the first row whose integers are not the product, or ALL_ROWS. The worker cannot bring that
        about: the mask's product was wrong, and with it a hint or this program.
    """
    yq_P = np.zeros(z_TF.shape[1] // 2, np.int64)
    return int(
        _unmask(
            z_TF,
            u_GTW,
            halves(u_GTW),
            after_P,
            scale_F,
            unit_T,
            expected_after_T,
            q,
            delta_bits,
            y_TF,
            first,
            stop,
            yq_P,
            yq_P.view(np.int32),
        )
    )


@compiled(
    "int64(float32[:, ::1], int32[:, ::1], uint32[:, :, ::1], uint16[:, :, ::1],"
    " int32[:, :, ::1], int64[::1], float64, float64, float64, int64, int64, uint8[:, ::1],"
    " float64[::1], int64[:, ::1], int64[::1], int64, int64, int64[:, ::1], int32[:, ::1],"
    " int64[:, ::1])"
)
def _quantize_and_mask(
    x_TD: Float32,
    bits_TD: Int32,
    words_GTW: UInt32,
    halves_GTH: UInt16,
    kw_22D: Int32,
    after_P: Int64,
    l1: float,
    l2: float,
    room: float,
    delta_bits: int,
    q: int,
    c_TB: Bytes,
    unit_T: Float64,
    expected_T2: Int64,
    expected_after_T: Int64,
    first: int,
    stop: int,
    xq_KP: Int64,
    xq_KD: Int32,
    c_KD: Int64,
) -> int:
    width, block = x_TD.shape[1], c_KD.shape[1] // words_GTW.shape[0]
    for t in range(first, stop):
        k = (t - first) % c_KD.shape[0]
        xq_D, c_D = xq_KD[k], c_KD[k]
        unit_T[t] = quantize_row(x_TD[t], bits_TD[t], l1, l2, room, xq_D)
        if unit_T[t] < 0.0:
            return t
        for g in range(words_GTW.shape[0]):
            for b in range(block):
                r = _residue(words_GTW[g, t, b], halves_GTH[g, t, 2 * block + b])
                value = (np.int64(xq_D[g * block + b]) << delta_bits) + r
                # A row of Wq that is not zero holds a 127, so |Δ · xq| ≤ q/254 [P2].
                c_D[g * block + b] = _canonical(_canonical(value - q, q), q)
        low_D, high_D = low_words(c_TB[t], width), high_words(c_TB[t], width)
        for i in range(width):
            low_D[i] = np.uint32(c_D[i])
            high_D[i] = np.uint16(c_D[i] >> np.int64(32))
        expected_T2[t, 0], expected_T2[t, 1] = _two_dots(kw_22D, c_D, q)
        expected_after_T[t] = _dot_of_pairs(after_P, xq_KP[k])
    return ALL_ROWS


@compiled(
    "void(int32[:, :, ::1], int64[::1], int64, int64[:, ::1], int64[::1], int64, int64,"
    " int64[:, ::1], int64[:, ::1])"
)
def _check_inputs(
    kw_22D: Int32,
    after_P: Int64,
    q: int,
    expected_T2: Int64,
    expected_after_T: Int64,
    first: int,
    stop: int,
    xq_KP: Int64,
    c_KD: Int64,
) -> None:
    for t in range(first, stop):
        expected_T2[t, 0], expected_T2[t, 1] = _two_dots(kw_22D, c_KD[t - first], q)
        expected_after_T[t] = _dot_of_pairs(after_P, xq_KP[t - first])


@compiled(
    "int64(uint8[:, ::1], int32[:, :, ::1], int64[:, ::1], int64, int64[:, ::1], int64, int64)"
)
def _verify(
    z_TB: Bytes,
    k_22F: Int32,
    expected_T2: Int64,
    q: int,
    z_TF: Int64,
    first: int,
    stop: int,
) -> int:
    features = k_22F.shape[2]
    for t in range(first, stop):
        z_F = z_TF[t]
        low_F, high_F = low_words(z_TB[t], features), high_words(z_TB[t], features)
        for f in range(features):
            z_F[f] = _residue(low_F[f], high_F[f])
        for f in range(features, z_F.size):
            z_F[f] = 0
        too_large = np.int64(0)
        for f in range(features):
            too_large += z_F[f] >= q
        if too_large > 0:
            return t
        found1, found2 = _two_dots(k_22F, z_F, q)
        if found1 != expected_T2[t, 0] or found2 != expected_T2[t, 1]:
            return t
    return ALL_ROWS


@compiled(
    "int64(int64[:, ::1], uint32[:, :, ::1], uint16[:, :, ::1], int64[::1], float64[::1],"
    " float64[::1], int64[::1], int64, int64, float32[:, ::1], int64, int64, int64[::1],"
    " int32[::1])"
)
def _unmask(
    z_TF: Int64,
    words_GTW: UInt32,
    halves_GTH: UInt16,
    after_P: Int64,
    scale_F: Float64,
    unit_T: Float64,
    expected_after_T: Int64,
    q: int,
    delta_bits: int,
    y_TF: Float32,
    first: int,
    stop: int,
    yq_P: Int64,
    yq_F: Int32,
) -> int:
    features, block = y_TF.shape[1], yq_F.size // words_GTW.shape[0]
    half_q, half_delta = q >> np.int64(1), np.int64(1) << np.int64(delta_bits - 1)
    for t in range(first, stop):
        z_F, y_F, unit = z_TF[t], y_TF[t], unit_T[t]
        for g in range(words_GTW.shape[0]):
            for b in range(block):
                u = _residue(words_GTW[g, t, b], halves_GTH[g, t, 2 * block + b])
                value = _canonical(z_F[g * block + b] - u, q)  # in [0, q)
                value = value - q if value > half_q else value
                yq_F[g * block + b] = np.int32((value + half_delta) >> np.int64(delta_bits))
        if _dot_of_pairs(after_P, yq_P) != expected_after_T[t]:
            return t
        for f in range(features):
            y_F[f] = np.float32(np.float64(yq_F[f]) * scale_F[f] * unit)
    return ALL_ROWS
