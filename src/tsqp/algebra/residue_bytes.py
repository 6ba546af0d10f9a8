"""Residues as they cross: rows of bytes.

Where p is wide, a row is little-endian int32. Where it is compact, a row of N residues is three
planes of N bytes, all low ones first: packed as tightly, and no harder to read than whole words.
"""

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.params import Field

Int32 = NDArray[np.int32]
Bytes = NDArray[np.uint8]


def in_planes(field: Field) -> bool:
    """Whether rows are planes of bytes; what the row functions below take."""
    return field.residue_bytes == 3


def pack(residues_TN: Int32, field: Field, bytes_TB: Bytes) -> None:
    """Write rows of bytes, as many for each residue as the field has."""
    _pack(residues_TN, in_planes(field), bytes_TB)


def unpack(bytes_TB: Bytes, field: Field, residues_TN: Int32) -> None:
    """Read rows of bytes; what is no residue comes as it is."""
    _unpack(bytes_TB, in_planes(field), residues_TN)


@inlined
def write_row(row_N: Int32, planes: bool, bytes_B: Bytes) -> None:
    """One row, for other compiled functions."""
    n = row_N.size
    if planes:
        low_N, middle_N, high_N = bytes_B[:n], bytes_B[n : 2 * n], bytes_B[2 * n :]
        for i in range(n):
            low_N[i] = np.uint8(row_N[i])
            middle_N[i] = np.uint8(row_N[i] >> np.int32(8))
            high_N[i] = np.uint8(row_N[i] >> np.int32(16))
    else:
        words_N = bytes_B.view(np.int32)
        for i in range(n):
            words_N[i] = row_N[i]


@inlined
def read_row(bytes_B: Bytes, planes: bool, row_N: Int32) -> None:
    """One row, for other compiled functions; each byte is read once."""
    n = row_N.size
    if planes:
        low_N, middle_N, high_N = bytes_B[:n], bytes_B[n : 2 * n], bytes_B[2 * n :]
        for i in range(n):
            row_N[i] = np.int32(low_N[i]) | np.int32(middle_N[i]) << 8 | np.int32(high_N[i]) << 16
    else:
        words_N = bytes_B.view(np.int32)
        for i in range(n):
            row_N[i] = words_N[i]


@compiled("void(int32[:, ::1], boolean, uint8[:, ::1])")
def _pack(residues_TN: Int32, planes: bool, bytes_TB: Bytes) -> None:
    for t in range(residues_TN.shape[0]):
        write_row(residues_TN[t], planes, bytes_TB[t])


@compiled("void(uint8[:, ::1], boolean, int32[:, ::1])")
def _unpack(bytes_TB: Bytes, planes: bool, residues_TN: Int32) -> None:
    for t in range(residues_TN.shape[0]):
        read_row(bytes_TB[t], planes, residues_TN[t])
