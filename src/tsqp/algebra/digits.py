"""Residues mod p as int8 digits and back [P9], for arrays on a CPU.

Shape suffixes: N residues in a row; L digits of each.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.params import Field

Residues = NDArray[Any]  # residues, of their field's dtype


def split(residues_N: Residues, field: Field, digits_LN: NDArray[np.int8]) -> None:
    """Write the balanced base-256 digits of c', lowest first: Σ 256^l · digits[l] ≡ c (mod p).

    Args:
        residues_N: in [0, p); other values give digits of something else, and no error.
        digits_LN: receives values in [-128, 127].
    """
    split_all = _split if field.dtype == np.int32 else _split_long
    split_all(residues_N, field.largest_digits, field.p, digits_LN)


def join(products_LN: NDArray[np.int32], field: Field, residues_N: Residues) -> None:
    """Write Σ 256^l · products[l] mod p, in [0, p). The products may be any int32."""
    join_all = _join if field.dtype == np.int32 else _join_long
    join_all(products_LN, field.bits, field.gap, residues_N)


def compile_loops(field: Field) -> None:
    """Compile both for residues of this field."""
    for kernel in (_split, _join) if field.dtype == np.int32 else (_split_long, _join_long):
        kernel.compile()


@inlined
def _split_all(residues_N: Residues, largest: int, p: int, digits_LN: NDArray[np.int8]) -> None:
    # Adding 128 to every digit makes balanced digits plain bytes, without a carry to pass on.
    shift = np.int64(0x808080808080) >> np.int64(8 * (6 - digits_LN.shape[0]))
    for level in range(digits_LN.shape[0]):
        row_N = digits_LN[level]
        move = np.int64(8 * level)
        for i in range(residues_N.size):
            c = np.int64(residues_N[i])
            if c > largest:
                c -= p
            row_N[i] = np.int8(((c + shift) >> move) & 255 ^ 128)


@compiled("void(int32[::1], int64, int64, int8[:, ::1])")
def _split(residues_N: Residues, largest: int, p: int, digits_LN: NDArray[np.int8]) -> None:
    _split_all(residues_N, largest, p, digits_LN)


@compiled("void(int64[::1], int64, int64, int8[:, ::1])")
def _split_long(residues_N: Residues, largest: int, p: int, digits_LN: NDArray[np.int8]) -> None:
    _split_all(residues_N, largest, p, digits_LN)


@inlined
def _reduce(value: Any, bits: int, gap: int) -> Any:
    """value mod 2^bits - gap, for |value| < 2^56 (bits = 31) or 2^48 (bits = 24)."""
    low = (np.int64(1) << bits) - 1
    value = (value >> bits) * gap + (value & low)  # ≡ value; |value| < 2^(bits + 1)
    value = (value >> bits) * gap + (value & low)  # in [-2 gap, 2^bits + 2 gap)
    p = low + 1 - gap
    if value < 0:
        value += p
    if value >= p:
        value -= p
    return value


@compiled("void(int32[:, ::1], int64, int64, int32[::1])")
def _join(products_LN: NDArray[np.int32], bits: int, gap: int, residues_N: Residues) -> None:
    levels = products_LN.shape[0]
    p0_N, p1_N, p2_N, p3_N = products_LN[0], products_LN[1], products_LN[2], products_LN[levels - 1]
    with_fourth = np.int64(-1) if levels == 4 else np.int64(0)
    for i in range(residues_N.size):
        value = ((np.int64(p3_N[i]) & with_fourth) << 24) + (np.int64(p2_N[i]) << 16)
        value += (np.int64(p1_N[i]) << 8) + np.int64(p0_N[i])
        residues_N[i] = np.int32(_reduce(value, bits, gap))


@compiled("void(int32[:, ::1], int64, int64, int64[::1])")
def _join_long(products_LN: NDArray[np.int32], bits: int, gap: int, residues_N: Residues) -> None:
    """Horner's rule from the highest digit, as the whole sum would not fit in 64 bits."""
    low = (np.int64(1) << bits) - 1
    p = low + 1 - gap
    levels = products_LN.shape[0]
    for i in range(residues_N.size):
        value = np.int64(products_LN[levels - 1, i])
        for level in range(levels - 2, -1, -1):
            value = (value << 8) + np.int64(products_LN[level, i])  # |value| < 2^47 · 2^8 + 2^31
            value = (value >> bits) * gap + (value & low)  # ≡ value; in [-2^26, 2^bits + 2^26)
        if value < 0:
            value += p
        if value >= p:
            value -= p
        residues_N[i] = value
