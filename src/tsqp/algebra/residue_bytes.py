"""Residues on the wire, as rows of bytes.

In the wide field, a row is little-endian int32. In the compact field, a row of N residues is three
planes of N bytes, beginning with all low bytes. This is packed tightly, and as easy to read as
whole words. In the lattice field, a row is N words of the low 32 bits, and then N of the upper 16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.params import Field

Int32 = NDArray[np.int32]
Bytes = NDArray[np.uint8]

_NO_WORDS: Int32 = np.empty((0, 0), np.int32)


def pack(residues_TN: NDArray[Any], field: Field, bytes_TB: Bytes) -> None:
    """Write rows of bytes; each residue takes the field's `residue_bytes`."""
    if field.residue_bytes == 3:
        _write_planes(residues_TN, bytes_TB)
    elif field.residue_bytes == 6:
        low_TN, high_TN = as_low_and_high(bytes_TB)
        low_TN[:] = residues_TN & 0xFFFFFFFF
        high_TN[:] = residues_TN >> 32
    else:
        bytes_TB.view(np.int32)[:] = residues_TN


def unpack(bytes_TB: Bytes, field: Field, residues_TN: NDArray[Any]) -> None:
    """Read rows of bytes, each once. Values that are not residues are returned unchanged."""
    if field.residue_bytes == 3:
        _read_planes(bytes_TB, residues_TN)
    elif field.residue_bytes == 6:
        low_TN, high_TN = as_low_and_high(bytes_TB)
        residues_TN[:] = high_TN
        residues_TN <<= 32
        residues_TN |= low_TN
    else:
        residues_TN[:] = bytes_TB.view(np.int32)


def as_words(bytes_TB: Bytes, field: Field) -> Int32:
    """The residues, not copied, if a row of this field consists of words; else an empty array.

    Args:
        bytes_TB: begins at a multiple of 4 bytes.
    """
    return _NO_WORDS if field.residue_bytes == 3 else bytes_TB.view(np.int32)


def as_low_and_high(bytes_TB: Bytes) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """The two parts of rows of the lattice field, not copied."""
    words = 4 * (bytes_TB.shape[1] // 6)
    return bytes_TB[:, :words].view("<u4"), bytes_TB[:, words:].view("<u2")


def compile_loops(field: Field) -> None:
    """Compile the loops for rows of this field."""
    if field.residue_bytes == 3:
        _write_planes.compile()
        _read_planes.compile()


@inlined
def copy_row(from_N: Int32, to_N: Int32) -> None:
    """A whole row, in a kernel; numba takes seconds to compile the assignment of one."""
    for i in range(from_N.size):
        to_N[i] = from_N[i]


@inlined
def write_row(row_N: Int32, words_TN: Int32, bytes_TB: Bytes, t: int) -> None:
    """Row t, in a kernel; `words_TN` is `as_words` of `bytes_TB`."""
    if words_TN.shape[0] > 0:
        copy_row(row_N, words_TN[t])
    else:
        _write_row(row_N, bytes_TB[t])


@inlined
def read_row(words_TN: Int32, bytes_TB: Bytes, t: int, row_N: Int32) -> None:
    """Row t, in a kernel; each byte is read once. `words_TN` is `as_words` of `bytes_TB`."""
    if words_TN.shape[0] > 0:
        copy_row(words_TN[t], row_N)
    else:
        _read_row(bytes_TB[t], row_N)


@inlined
def low_words(row_B: Bytes, count: int) -> NDArray[np.uint32]:
    """The low parts in a row of the lattice field, in a kernel."""
    return row_B[: 4 * count].view(np.uint32)


@inlined
def high_words(row_B: Bytes, count: int) -> NDArray[np.uint16]:
    """The high parts in a row of the lattice field, in a kernel."""
    return row_B[4 * count : 6 * count].view(np.uint16)


@inlined
def _write_row(row_N: Int32, bytes_B: Bytes) -> None:
    n = row_N.size
    low_N, middle_N, high_N = bytes_B[:n], bytes_B[n : 2 * n], bytes_B[2 * n :]
    for i in range(n):
        low_N[i] = np.uint8(row_N[i])
        middle_N[i] = np.uint8(row_N[i] >> np.int32(8))
        high_N[i] = np.uint8(row_N[i] >> np.int32(16))


@inlined
def _read_row(bytes_B: Bytes, row_N: Int32) -> None:
    n = row_N.size
    low_N, middle_N, high_N = bytes_B[:n], bytes_B[n : 2 * n], bytes_B[2 * n :]
    for i in range(n):
        row_N[i] = np.int32(low_N[i]) | np.int32(middle_N[i]) << 8 | np.int32(high_N[i]) << 16


@compiled("void(int32[:, ::1], uint8[:, ::1])")
def _write_planes(residues_TN: Int32, bytes_TB: Bytes) -> None:
    for t in range(residues_TN.shape[0]):
        _write_row(residues_TN[t], bytes_TB[t])


@compiled("void(uint8[:, ::1], int32[:, ::1])")
def _read_planes(bytes_TB: Bytes, residues_TN: Int32) -> None:
    for t in range(residues_TN.shape[0]):
        _read_row(bytes_TB[t], residues_TN[t])
