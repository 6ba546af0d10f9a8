"""The two loops of a masked linear layer: one pass over the input, one over the answer.

Only a finished row of c is ever copied to memory that the worker can map. A row of the answer is
copied from there once, and everything is computed from the copy: the worker may change the shared
one at any moment.

Shape suffixes: T tokens; K of them that are kept; D input and F output features; N of either; P
pairs of them; B bytes of a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra import digits, rejection, residue_bytes
from tsqp.algebra.native import compiled, inlined, reordered
from tsqp.algebra.params import CHECK_MODULUS, Field
from tsqp.algebra.residue_bytes import Bytes, Int32, as_words, copy_row, read_row, write_row

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ALL_ROWS = -1  # what a kernel returns if no row is at fault
KEPT_ROWS = 8  # of an input that several shards get: they stay in the cache for all check vectors
BLOCK = 128  # pairs of products k · xq that add up without overflow: 2^31 · 2^24 · 2 · 2^7 = 2^63


def quantize_and_pad(
    x_TD: Float32,
    r_TD: Int32,
    checks_2P: Sequence[Int64],
    l1: float,
    l2: float,
    room: float,
    field: Field,
    c_TB: Bytes,
    unit_T: Float64,
    expected_T2: Sequence[Int64],
    first: int,
    stop: int,
) -> int:
    """[P2], [P5] and the right side of [P7]: c = round(x · a) + r mod p, and k_iW · xq mod P.

    Args:
        r_TD: the pad, in [0, p).
        checks_2P: k_iW, in [0, P), `as_pairs`, of each shard that gets c.
        l1, l2: the bounds of the group's weights, and `room` what they leave.
        c_TB: shared memory; receives the rows of c as bytes.
        unit_T: receives 1/a, the size of one step of xq; 0 for a row of zeros.
        expected_T2: for each shard, receives k_iW · xq mod P.
        first, stop: the rows to do.

    Returns:
        the first row with NaN or Inf, or ALL_ROWS. Rows from there on are to be discarded.
    """
    c_words_TD, bits_TD = as_words(c_TB, field), x_TD.view(np.int32)
    kept, step = rows_to_keep(len(checks_2P), stop - first)
    xq_KP = np.zeros((kept, -(-x_TD.shape[1] // 2)), np.int64)
    xq_KD = xq_KP.view(np.int32)
    c_D = np.empty(x_TD.shape[1], np.int32)
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        fault = _quantize_and_pad(
            x_TD,
            bits_TD,
            r_TD,
            checks_2P[0],
            l1,
            l2,
            room,
            field.p,
            c_words_TD,
            c_TB,
            unit_T,
            expected_T2[0],
            begin,
            end,
            xq_KP,
            xq_KD,
            c_D,
        )
        if fault != ALL_ROWS:
            return int(fault)
        for check_2P, expected in zip(checks_2P[1:], expected_T2[1:], strict=True):
            _check_inputs(check_2P, xq_KP, expected, begin, end)
    return ALL_ROWS


def rows_to_keep(shards: int, rows: int) -> tuple[int, int]:
    """How many rows of integers a loop over the input keeps, and how many it does at a time.

    One shard needs the row that was made last, and several need all rows of a step.
    """
    if shards == 1:
        return 1, max(1, rows)
    return KEPT_ROWS, KEPT_ROWS


def unpad_and_check(
    z_TB: Bytes,
    u_TF: Int32,
    k_2P: Int64,
    scale_F: Float64,
    unit_T: Float64,
    expected_T2: Int64,
    field: Field,
    y_TF: Float32,
    first: int,
    stop: int,
) -> int:
    """[P5], [P7], [P3]: y = centre(z - u mod p) · s / a, once k_i · yq ≡ k_iW · xq (mod P).

    Args:
        z_TB: shared memory, the worker's answer as bytes, which `aligned` has seen; each is read
            once.
        u_TF: the pad's product, in [0, p).
        k_2P: the check vectors, in [0, P), `as_pairs`.
        scale_F: the weights' scales, which are float32, widened.
        y_TF: private memory. Worthless unless ALL_ROWS is returned.
        first, stop: the rows to do.

    Returns:
        the first row that holds a residue outside [0, p) or fails the check, or ALL_ROWS.
    """
    z_words_TF = as_words(z_TB, field)
    z_F = np.empty(u_TF.shape[1], np.int32)
    yq_P = np.zeros(-(-u_TF.shape[1] // 2), np.int64)
    yq_F = yq_P.view(np.int32)[: u_TF.shape[1]]
    return int(
        _unpad_and_check(
            z_words_TF,
            z_TB,
            u_TF,
            k_2P,
            scale_F,
            unit_T,
            expected_T2,
            field.p,
            y_TF,
            first,
            stop,
            z_F,
            yq_P,
            yq_F,
        )
    )


def subtract_answer(z_TB: Bytes, field: Field, u_TF: Int32) -> int:
    """u -= z mod p: what other workers answered, if the input was shared [P8].

    Args:
        z_TB: as in `unpad_and_check`.

    Returns:
        the first row that holds a residue outside [0, p), or ALL_ROWS.
    """
    z_F, rest_F = np.empty((2, u_TF.shape[1]), np.int32)
    return int(_subtract(as_words(z_TB, field), z_TB, field.p, u_TF, z_F, rest_F))


def aligned(z_TB: Tensor) -> Bytes:
    """The answer as an array; a copy if its address is not aligned, as in a frame from a socket."""
    return (z_TB.clone() if z_TB.data_ptr() % 4 else z_TB).numpy()


def as_pairs(k_2N: Int32) -> Int64:
    """Two residues to a word, the low one first; an odd row ends with a 0.

    Multiplied as pairs, 32 bits need not be spread to 64 first, which takes as long.
    """
    return np.pad(k_2N, ((0, 0), (0, k_2N.shape[1] % 2))).view(np.int64)


def compile_loops(field: Field, *, shares: bool) -> None:
    """Compile the loops, which would otherwise be done while somebody waits for an answer.

    Args:
        shares: also what adds up the answers of several workers [P8].
    """
    _quantize_and_pad.compile()
    _check_inputs.compile()
    _unpad_and_check.compile()
    if shares:
        _subtract.compile()
    residue_bytes.compile_loops(field)
    digits.compile_loops(field)
    rejection.compile_loops(field)


@inlined
def fold(value: Any) -> Any:
    """≡ value mod P, and smaller than 2^33 in size."""
    return (value & np.int64(CHECK_MODULUS)) + (value >> np.int64(31))


@reordered
def _measure(x_D: Float32, bits_D: Int32) -> tuple[Any, Any]:
    """max |x|, as bits, and Σ x² in float64, which is not finite if and only if some x is not.

    Of floats without their sign, the order of the bits is the order of the values. The sum, in
    whatever order, is off by 2⁻³⁵ of itself at most, which ROUNDING_MARGIN pays for.
    """
    most, squares = np.int32(0), 0.0
    for i in range(x_D.size):
        most = max(most, np.int32(bits_D[i] & np.int32(0x7FFFFFFF)))
        squares += np.float64(x_D[i]) * np.float64(x_D[i])
    return most, squares


@inlined
def quantize_row(
    x_D: Float32, bits_D: Int32, l1: float, l2: float, room: float, xq_D: Int32
) -> Any:
    """[P2]: write xq and return 1/a; negative if x is not finite."""
    most, squares = _measure(x_D, bits_D)
    if not np.isfinite(squares):
        return -1.0
    largest = np.float64(np.int32(most).view(np.float32))
    bound = min(l1 * largest, l2 * np.sqrt(squares))
    a = room / bound if bound > 0.0 else 0.0
    for i in range(x_D.size):
        xq_D[i] = np.int32(np.rint(np.float64(x_D[i]) * a))
    return bound / room


@inlined
def _pad_row(xq_D: Int32, r_D: Int32, p: int, c_D: Int32) -> None:
    """[P5]: c = xq + r mod p, without a sum outside 32 bits: r - p is negative."""
    p32 = np.int32(p)
    for i in range(xq_D.size):
        value = np.int32(r_D[i] + xq_D[i])
        if xq_D[i] >= 0:
            value = np.int32(value - p32)
        if value < 0:
            value = np.int32(value + p32)
        c_D[i] = value


@inlined
def low_of(pair: Any) -> Any:
    return np.int64(np.int32(pair))


@inlined
def high_of(pair: Any) -> Any:
    return pair >> np.int64(32)


@inlined
def _dot_block(k1_P: Int64, k2_P: Int64, xq_P: Int64) -> tuple[Any, Any]:
    sum1, sum2 = np.int64(0), np.int64(0)
    for i in range(xq_P.size):
        low, high = low_of(xq_P[i]), high_of(xq_P[i])
        sum1 += low_of(k1_P[i]) * low + high_of(k1_P[i]) * high
        sum2 += low_of(k2_P[i]) * low + high_of(k2_P[i]) * high
    return sum1, sum2


@inlined
def _check_input(check_2P: Int64, xq_P: Int64, expected_2: Int64) -> None:
    """[P7], right side: k_iW · xq mod P. |xq| < 2^24, as every row of Wq that counts has a 127."""
    sum1, sum2 = np.int64(0), np.int64(0)
    for first in range(0, xq_P.size, BLOCK):
        some = slice(first, first + BLOCK)
        part1, part2 = _dot_block(check_2P[0, some], check_2P[1, some], xq_P[some])
        sum1 += fold(part1)
        sum2 += fold(part2)
    expected_2[0] = sum1 % CHECK_MODULUS
    expected_2[1] = sum2 % CHECK_MODULUS


@inlined
def _unpad_row(z_F: Int32, u_F: Int32, p: int, yq_F: Int32) -> Any:
    """[P5]: yq = centre(z - u mod p); whether every z was a residue."""
    p32 = np.int32(p)
    half = np.int32((p - 1) // 2)
    most = np.uint32(0)
    for f in range(z_F.size):
        z = z_F[f]
        most = max(most, np.uint32(z))  # which a negative one is too
        value = np.int32(z - u_F[f])
        if value > half:
            value = np.int32(value - p32)
        if value < -half:
            value = np.int32(value + p32)
        yq_F[f] = value
    return most < np.uint32(p)


@inlined
def _check_answer(k_2P: Int64, yq_P: Int64, expected_2: Int64) -> Any:
    """[P7], left side: k_i · yq mod P is as expected. Four products of 2^61 fit, then a fold."""
    k1_P, k2_P = k_2P[0], k_2P[1]
    sum1, sum2 = np.int64(0), np.int64(0)
    half = yq_P.size // 2
    for i in range(half):
        j = i + half
        y0, y1, y2, y3 = low_of(yq_P[i]), high_of(yq_P[i]), low_of(yq_P[j]), high_of(yq_P[j])
        sum1 += fold(
            low_of(k1_P[i]) * y0
            + high_of(k1_P[i]) * y1
            + low_of(k1_P[j]) * y2
            + high_of(k1_P[j]) * y3
        )
        sum2 += fold(
            low_of(k2_P[i]) * y0
            + high_of(k2_P[i]) * y1
            + low_of(k2_P[j]) * y2
            + high_of(k2_P[j]) * y3
        )
    for i in range(2 * half, yq_P.size):
        y0, y1 = low_of(yq_P[i]), high_of(yq_P[i])
        sum1 += fold(low_of(k1_P[i]) * y0 + high_of(k1_P[i]) * y1)
        sum2 += fold(low_of(k2_P[i]) * y0 + high_of(k2_P[i]) * y1)
    return sum1 % CHECK_MODULUS == expected_2[0] and sum2 % CHECK_MODULUS == expected_2[1]


# Every loop writes to another array than it reads: a loop in place would not be vectorised. Arrays
# for one row come from outside, as numba takes most of a second to compile their allocation.


@compiled(
    "int64(float32[:, ::1], int32[:, ::1], int32[:, ::1], int64[:, ::1], float64, float64,"
    " float64, int64, int32[:, ::1], uint8[:, ::1], float64[::1], int64[:, ::1], int64, int64,"
    " int64[:, ::1], int32[:, ::1], int32[::1])"
)
def _quantize_and_pad(
    x_TD: Float32,
    bits_TD: Int32,
    r_TD: Int32,
    check_2P: Int64,
    l1: float,
    l2: float,
    room: float,
    p: int,
    c_words_TD: Int32,
    c_TB: Bytes,
    unit_T: Float64,
    expected_T2: Int64,
    first: int,
    stop: int,
    xq_KP: Int64,
    xq_KD: Int32,
    c_D: Int32,
) -> int:
    for t in range(first, stop):
        k = (t - first) % xq_KP.shape[0]
        xq_D = xq_KD[k, : x_TD.shape[1]]
        unit_T[t] = quantize_row(x_TD[t], bits_TD[t], l1, l2, room, xq_D)
        if unit_T[t] < 0.0:
            return t
        _pad_row(xq_D, r_TD[t], p, c_D)
        write_row(c_D, c_words_TD, c_TB, t)
        _check_input(check_2P, xq_KP[k], expected_T2[t])
    return ALL_ROWS


@compiled("void(int64[:, ::1], int64[:, ::1], int64[:, ::1], int64, int64)")
def _check_inputs(check_2P: Int64, xq_KP: Int64, expected_T2: Int64, first: int, stop: int) -> None:
    for t in range(first, stop):
        _check_input(check_2P, xq_KP[t - first], expected_T2[t])


@compiled(
    "int64(int32[:, ::1], uint8[:, ::1], int32[:, ::1], int64[:, ::1], float64[::1], float64[::1],"
    " int64[:, ::1], int64, float32[:, ::1], int64, int64, int32[::1], int64[::1], int32[::1])"
)
def _unpad_and_check(
    z_words_TF: Int32,
    z_TB: Bytes,
    u_TF: Int32,
    k_2P: Int64,
    scale_F: Float64,
    unit_T: Float64,
    expected_T2: Int64,
    p: int,
    y_TF: Float32,
    first: int,
    stop: int,
    z_F: Int32,
    yq_P: Int64,
    yq_F: Int32,
) -> int:
    for t in range(first, stop):
        read_row(z_words_TF, z_TB, t, z_F)
        if not _unpad_row(z_F, u_TF[t], p, yq_F):
            return t
        if not _check_answer(k_2P, yq_P, expected_T2[t]):
            return t
        y_F, unit = y_TF[t], unit_T[t]
        for f in range(yq_F.size):
            y_F[f] = np.float32(np.float64(yq_F[f]) * scale_F[f] * unit)
    return ALL_ROWS


@compiled("int64(int32[:, ::1], uint8[:, ::1], int64, int32[:, ::1], int32[::1], int32[::1])")
def _subtract(
    z_words_TF: Int32, z_TB: Bytes, p: int, u_TF: Int32, z_F: Int32, rest_F: Int32
) -> int:
    p32 = np.int32(p)
    for t in range(u_TF.shape[0]):
        u_F = u_TF[t]
        read_row(z_words_TF, z_TB, t, z_F)
        outside = np.int32(0)
        for f in range(z_F.size):
            outside |= np.int32(z_F[f] < 0) | np.int32(z_F[f] >= p32)
            value = np.int32(u_F[f] - z_F[f])
            rest_F[f] = value + p32 if value < 0 else value
        if outside != 0:
            return t
        copy_row(rest_F, u_F)
    return ALL_ROWS
