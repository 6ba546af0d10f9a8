"""Exact products of residues with int8 weights on a CUDA device, through library calls [P9].

Shape suffixes: T tokens; D input and F output features; L digits; M rows of digits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.algebra.params import LATTICE, Field

MULTIPLE = 8  # torch._int_mm needs both feature counts to be multiples of this, and MIN_ROWS rows
MIN_ROWS = 32


def residue_product(c_TD: Tensor, weight_FD: Tensor, field: Field) -> Tensor:
    """z = Wq · c mod p, [T, F] of the dtype of c, on the device of the arguments.

    Args:
        c_TD: int32 in [0, p), or int64 in the lattice field.
        weight_FD: int8 in [-127, 127], D ≤ MAX_WIDTH.
    """
    rows, width = c_TD.shape
    products_MF = _int8_product(_split(c_TD, field).view(-1, width), weight_FD)
    products_LTF = products_MF.view(field.digits, rows, -1)
    z_TF = products_LTF[-1].long()
    for level in reversed(range(field.digits - 1)):
        if field is LATTICE:  # the whole sum would not fit in 64 bits
            z_TF = z_TF.remainder_(field.p)
        z_TF = z_TF.mul_(256).add_(products_LTF[level])
    return z_TF.remainder_(field.p).to(c_TD.dtype)


def _split(c_TD: Tensor, field: Field) -> Tensor:
    """Balanced base-256 digits of c', int8 [L, T, D]; see `tsqp.algebra.digits`."""
    c_TD = c_TD.long()
    shifted = torch.where(c_TD > field.largest_digits, c_TD - field.p, c_TD)
    shifted += 0x808080808080 >> 8 * (6 - field.digits)
    levels = [((shifted >> 8 * level) & 255) - 128 for level in range(field.digits)]
    return torch.stack(levels).to(torch.int8)


def _int8_product(a_MD: Tensor, weight_FD: Tensor) -> Tensor:
    features, width = weight_FD.shape
    if width % MULTIPLE or features % MULTIPLE:
        return (a_MD.double() @ weight_FD.double().t()).to(torch.int32)  # below 2^31: exact
    rows = len(a_MD)
    missing = max(MIN_ROWS - rows, -rows % MULTIPLE)
    return torch._int_mm(F.pad(a_MD, (0, 0, 0, missing)), weight_FD.t())[:rows]
