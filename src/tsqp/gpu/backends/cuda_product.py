"""Exact products of residues with int8 weights on a CUDA device, through library calls [P9].

Shape suffixes: T tokens; D input and F output features; L digits; M rows of digits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.algebra.params import LATTICE, Field
from tsqp.gpu.backends import device_residues

MULTIPLE = 8  # torch._int_mm needs both feature counts to be multiples of this, and MIN_ROWS rows
MIN_ROWS = 32
SLOW_INT8 = ((10, 3), (12, 0))  # compute capabilities whose int8 is slower than their bfloat16
# The largest |digit · weight| is 128 · 127, and float32 holds integers up to 2^24: a sum of 1,032
# products is exact in any order. 1,024 keeps the pieces aligned.
EXACT_WIDTH = 1024


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether digits are multiplied faster as bfloat16 than as int8 on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in SLOW_INT8


def packed_product(
    c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor, *, in_bfloat16: bool = False
) -> None:
    """Write out = Wq · c mod p, from packed residues to packed residues on one device.

    Args:
        c_TB, out_TB: uint8, contiguous rows of packed residues; see `tsqp.algebra.residue_bytes`.
            What is not a residue gives a wrong answer and no error.
        weight_FD, in_bfloat16: see `residue_product`.
    """
    c_TD = device_residues.unpack(c_TB, field)
    z_TF = residue_product(c_TD, weight_FD, field, in_bfloat16=in_bfloat16)
    device_residues.pack(z_TF, field, out_TB)


def residue_product(
    c_TD: Tensor, weight_FD: Tensor, field: Field, *, in_bfloat16: bool = False
) -> Tensor:
    """z = Wq · c mod p, [T, F] of the dtype of c, on the device of the arguments.

    Args:
        c_TD: int32 in [0, p), or int64 in the lattice field.
        weight_FD: int8 in [-127, 127], D ≤ MAX_WIDTH.
        in_bfloat16: multiply digits as bfloat16, which holds them exactly.
    """
    rows, width = c_TD.shape
    multiply = _bfloat16_product if in_bfloat16 else _int8_product
    products_MF = multiply(_split(c_TD, field).view(-1, width), weight_FD)
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


def _bfloat16_product(a_MD: Tensor, weight_FD: Tensor) -> Tensor:
    """The same in pieces of EXACT_WIDTH input features, whose sums in float32 are exact."""
    sums_MF = torch.zeros(len(a_MD), len(weight_FD), dtype=torch.int32, device=a_MD.device)
    for a_MC, weight_FC in zip(
        a_MD.split(EXACT_WIDTH, dim=1), weight_FD.split(EXACT_WIDTH, dim=1), strict=True
    ):
        sums_MF += _float32_sums(a_MC.bfloat16(), weight_FC.bfloat16()).to(torch.int32)
    return sums_MF


def _float32_sums(a_MC: Tensor, weight_FC: Tensor) -> Tensor:
    if a_MC.is_cuda:
        return torch.mm(a_MC, weight_FC.t(), out_dtype=torch.float32)
    return a_MC.float() @ weight_FC.float().t()  # a CPU has no such operator
