"""Exact products of int8 matrices on a CPU, and of residues with int8 weights [P9].

Shape suffixes: M rows; T tokens; D input and F output features; L digits.
"""

from functools import cache

import torch
from torch import Tensor

from tsqp.algebra import digits
from tsqp.algebra.params import MAX_WIDTH, Field

BLOCK_ROWS = 128  # tokens whose digits and products are in the cache at once


@cache
def fast_product_is_exact() -> bool:
    """Whether `torch._int_mm` of this CPU is right; without VNNI it saturates in 16 bits.

    The operands are the largest there are, and random ones, in shapes for one and many tokens;
    the right one lies in memory by rows, and by columns as weights that are transposed do.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, width, features in ((1, 64, 48), (4, 64, 48), (67, 576, 80)):
        pairs = [
            (torch.full((rows, width), digit), torch.full((width, features), weight))
            for digit in (-128, 127)
            for weight in (127, -127)
        ]
        pairs.append(
            (
                torch.randint(-128, 128, (rows, width), generator=generator),
                torch.randint(-127, 128, (width, features), generator=generator),
            )
        )
        for a_MD, b_DF in pairs:
            expected_MF = a_MD @ b_DF
            by_rows = b_DF.to(torch.int8)
            by_columns = by_rows.t().contiguous().t()
            try:
                found = [torch._int_mm(a_MD.to(torch.int8), b) for b in (by_rows, by_columns)]
            except RuntimeError:  # not built into this torch
                return False
            if not all(torch.equal(found_MF.long(), expected_MF) for found_MF in found):
                return False
    return True


def int8_product(a_MD: Tensor, b_DF: Tensor) -> Tensor:
    """a · b as int32 [M, F], exact for D ≤ MAX_WIDTH.

    Args:
        a_MD, b_DF: int8 on the CPU; entries of b in [-127, 127].
    """
    assert a_MD.shape[1] <= MAX_WIDTH
    # A dimension of one element has any stride, by which `_int_mm` mistakes rows for columns.
    if min(*a_MD.shape, *b_DF.shape) > 1 and fast_product_is_exact():
        return torch._int_mm(a_MD, b_DF)
    return (a_MD.double() @ b_DF.double()).to(torch.int32)  # below 2^31, and double has 53 bits


def residue_product(c_TD: Tensor, weight_FD: Tensor, field: Field, z_TF: Tensor) -> None:
    """Write z = W · c mod p, in [0, p).

    Args:
        c_TD: in [0, p), of the field's dtype, contiguous. Anything else gives a wrong answer, and
            no error.
        weight_FD: int8 in [-127, 127].
        z_TF: of the field's dtype, contiguous.
    """
    width = c_TD.shape[1]
    for first in range(0, len(c_TD), BLOCK_ROWS):
        c_N = c_TD[first : first + BLOCK_ROWS].view(-1)
        digits_LN = torch.empty(field.digits, len(c_N), dtype=torch.int8)
        digits.split(c_N.numpy(), field, digits_LN.numpy())
        products_MF = int8_product(digits_LN.view(-1, width), weight_FD.t())
        z_N = z_TF[first : first + BLOCK_ROWS].view(-1)
        digits.join(products_MF.view(field.digits, -1).numpy(), field, z_N.numpy())
