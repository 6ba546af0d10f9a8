"""The loops of a linear layer under lattice masks: one over the input, two over the answer.

The answer is checked as it crossed, every row of it, before any of it is unmasked [P13]: a check
after the rounding would tell a worker, by its errors, about the noise. Both sides of that check are
public but for the check vectors. What is used of an answer is a private copy.

Shape suffixes: T tokens; D input and F output features; P pairs of features; B bytes of a row, as
`residue_bytes` has them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.modular import canonical, multiply
from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.params import CHECK_MODULUS
from tsqp.algebra.residue_bytes import Bytes, high_words, low_words
from tsqp.tee.crypto.kernels import ALL_ROWS, fold, high_of, low_of, quantize_row

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

SUM = 2**14  # products mod q, each below 2^47 in size, that are added up at once


def prepare() -> None:
    """Compile the loops."""
    for kernel in (quantize_and_mask, verify, unmask):
        kernel.compile()


@inlined
def _value(low: Any, high: Any) -> Any:
    return np.float64(low) + np.float64(high) * 4294967296.0


@inlined
def _dot(k_D: Float64, c_D: Float64, q: float) -> Any:
    """k · c mod q, in [0, q), for centred k and c in [0, q)."""
    one_over_q = 1.0 / q
    total = np.int64(0)
    for first in range(0, c_D.size, SUM):
        part = np.int64(0)
        for i in range(first, min(first + SUM, c_D.size)):
            part += np.int64(multiply(c_D[i], k_D[i], k_D[i] * one_over_q, q))
        total += part % np.int64(q)
    return total % np.int64(q)


@inlined
def _dot_of_pairs(k_P: Int64, xq_P: Int64) -> Any:
    """k · xq mod P of [P7], for k in [0, P) and |xq| < 2^31."""
    total = np.int64(0)
    for i in range(xq_P.size):
        total += fold(low_of(k_P[i]) * low_of(xq_P[i]) + high_of(k_P[i]) * high_of(xq_P[i]))
    return total % CHECK_MODULUS


@compiled(
    "int64(float32[:, ::1], int32[:, ::1], uint8[:, ::1], float64[:, ::1], int64[::1], float64,"
    " float64, float64, float64, float64, uint8[:, ::1], float64[::1], int64[:, ::1], int64[::1],"
    " int64, int64)"
)
def quantize_and_mask(
    x_TD: Float32,
    bits_TD: Int32,
    r_TB: Bytes,
    kw_2D: Float64,
    after_P: Int64,
    l1: float,
    l2: float,
    room: float,
    delta: float,
    q: float,
    c_TB: Bytes,
    unit_T: Float64,
    expected_T2: Int64,
    expected_after_T: Int64,
    first: int,
    stop: int,
) -> int:
    """[P12] and the right sides of [P13] and [P7]: c = Δ · round(x · a) + r mod q.

    Args:
        bits_TD: x_TD as int32.
        r_TB: the mask, in [0, q).
        kw_2D: k_iW mod q, centred.
        after_P: kW mod P of the check after rounding, as pairs.
        l1, l2, room: the bounds of the group's weights, and what they leave [P2], [P12].
        delta: Δ; |Δ · xq| < q.
        c_TB: shared memory; receives finished rows of c only.
        unit_T: receives 1/a; 0 for a row of zeros.
        expected_T2: receives k_iW · c mod q.
        expected_after_T: receives kW · xq mod P.
        first, stop: the rows to do.

    Returns:
        the first row with NaN or Inf, or ALL_ROWS. Rows from there on are to be discarded.
    """
    width = x_TD.shape[1]
    xq_P = np.zeros(after_P.size, np.int64)
    xq_D = xq_P.view(np.int32)[:width]
    c_D = np.empty(width, np.float64)
    low_D, high_D = np.empty(width, np.uint32), np.empty(width, np.uint16)
    for t in range(first, stop):
        unit_T[t] = quantize_row(x_TD[t], bits_TD[t], l1, l2, room, xq_D)
        if unit_T[t] < 0.0:
            return t
        r_low_D, r_high_D = low_words(r_TB[t], width), high_words(r_TB[t], width)
        for i in range(width):
            value = np.float64(xq_D[i]) * delta + _value(r_low_D[i], r_high_D[i])
            # A row of Wq that is not zero holds a 127, so |Δ · xq| ≤ q/254 [P2].
            value = canonical(canonical(value - q, q), q)
            c_D[i] = value
            bits = np.int64(value)
            low_D[i] = np.uint32(bits)
            high_D[i] = np.uint16(bits >> np.int64(32))
        out_low_D, out_high_D = low_words(c_TB[t], width), high_words(c_TB[t], width)
        for i in range(width):
            out_low_D[i] = low_D[i]
            out_high_D[i] = high_D[i]
        expected_T2[t, 0] = _dot(kw_2D[0], c_D, q)
        expected_T2[t, 1] = _dot(kw_2D[1], c_D, q)
        expected_after_T[t] = _dot_of_pairs(after_P, xq_P)
    return ALL_ROWS


@compiled(
    "int64(uint8[:, ::1], float64[:, ::1], int64[:, ::1], float64, float64[:, ::1], int64, int64)"
)
def verify(
    z_TB: Bytes,
    k_2F: Float64,
    expected_T2: Int64,
    q: float,
    z_TF: Float64,
    first: int,
    stop: int,
) -> int:
    """[P13]: copy the answer into private memory, and check it there: k_i · z ≡ k_iW · c (mod q).

    Args:
        z_TB: shared memory, each element read once.
        k_2F: the check vectors mod q, centred.
        z_TF: private memory; receives the answer.
        first, stop: the rows to do.

    Returns:
        the first row that holds a value outside [0, q) or fails the check, or ALL_ROWS.
    """
    for t in range(first, stop):
        z_F = z_TF[t]
        low_F, high_F = low_words(z_TB[t], z_F.size), high_words(z_TB[t], z_F.size)
        for f in range(z_F.size):
            z_F[f] = _value(low_F[f], high_F[f])
        most = 0.0
        for f in range(z_F.size):
            most = max(most, z_F[f])
        if most >= q:
            return t
        if _dot(k_2F[0], z_F, q) != expected_T2[t, 0] or _dot(k_2F[1], z_F, q) != expected_T2[t, 1]:
            return t
    return ALL_ROWS


@compiled(
    "int64(float64[:, ::1], uint8[:, ::1], int64[::1], float64[::1], float64[::1], int64[::1],"
    " float64, int64, float32[:, ::1], int64, int64)"
)
def unmask(
    z_TF: Float64,
    u_TB: Bytes,
    after_P: Int64,
    scale_F: Float64,
    unit_T: Float64,
    expected_after_T: Int64,
    q: float,
    delta_bits: int,
    y_TF: Float32,
    first: int,
    stop: int,
) -> int:
    """[P12], [P3]: yq = (centre(z - u mod q) + Δ/2) >> log2 Δ, y = yq · s / a; then one check [P7].

    For answers that `verify` has accepted, all rows of them.

    Args:
        z_TF: private memory.
        u_TB: the mask's product, in [0, q).
        after_P: the check vector mod P, as pairs.
        y_TF: private memory. Worthless unless ALL_ROWS is returned.
        first, stop: the rows to do.

    Returns:
        the first row whose integers are not the product, or ALL_ROWS. The worker cannot bring that
        about: the mask's product was wrong, and with it a hint or this program.
    """
    features = z_TF.shape[1]
    yq_P = np.zeros(after_P.size, np.int64)
    yq_F = yq_P.view(np.int32)[:features]
    half_q, half_delta = (q - 1.0) / 2.0, np.int64(1) << np.int64(delta_bits - 1)
    for t in range(first, stop):
        z_F, y_F, unit = z_TF[t], y_TF[t], unit_T[t]
        u_low_F, u_high_F = low_words(u_TB[t], features), high_words(u_TB[t], features)
        for f in range(features):
            value = canonical(z_F[f] - _value(u_low_F[f], u_high_F[f]), q)  # in [0, q)
            value = value - q if value > half_q else value
            yq_F[f] = np.int32((np.int64(value) + half_delta) >> np.int64(delta_bits))
        if _dot_of_pairs(after_P, yq_P) != expected_after_T[t]:
            return t
        for f in range(features):
            y_F[f] = np.float32(np.float64(yq_F[f]) * scale_F[f] * unit)
    return ALL_ROWS
