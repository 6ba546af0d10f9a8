"""Packs and unpacks residues on a device, with operators of torch; see `algebra.residue_bytes`.

Shape suffixes: T tokens; N residues of a row; B bytes of a row; U units of 16 bits of a row.
"""

import torch
from torch import Tensor

from tsqp.algebra.params import Field


def unpack(bytes_TB: Tensor, field: Field) -> Tensor:
    """The residues, [T, N]: int32, or int64 in the lattice field. Anything else stays as it is.

    Args:
        bytes_TB: uint8, contiguous.
    """
    rows = len(bytes_TB)
    if field.residue_bytes == 4:
        return bytes_TB.view(torch.int32)
    if field.residue_bytes == 3:
        low_TN, middle_TN, high_TN = bytes_TB.int().tensor_split(3, dim=1)
        return low_TN + (middle_TN << 8) + (high_TN << 16)
    # Halves of words, as rows of an odd number of residues do not end at a whole word.
    units_TU = bytes_TB.view(torch.int16).long() & 0xFFFF
    size = units_TU.shape[1] // 3
    words_TN2 = units_TU[:, : 2 * size].reshape(rows, size, 2)
    return words_TN2[..., 0] + (words_TN2[..., 1] << 16) + (units_TU[:, 2 * size :] << 32)


def pack(residues_TN: Tensor, field: Field, bytes_TB: Tensor) -> None:
    """Write rows of bytes.

    Args:
        residues_TN: in [0, p).
        bytes_TB: uint8, contiguous.
    """
    size = residues_TN.shape[1]
    if field.residue_bytes == 4:
        bytes_TB.view(torch.int32).copy_(residues_TN)
    elif field.residue_bytes == 3:
        parts = [(residues_TN >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)]
        torch.cat(parts, dim=1, out=bytes_TB)
    else:
        units_TU = bytes_TB.view(torch.int16)
        words_TN2 = units_TU[:, : 2 * size].unflatten(1, (size, 2))
        # Of a larger number, the low bits are kept.
        words_TN2[..., 0] = residues_TN.to(torch.int16)
        words_TN2[..., 1] = (residues_TN >> 16).to(torch.int16)
        units_TU[:, 2 * size :] = (residues_TN >> 32).to(torch.int16)
