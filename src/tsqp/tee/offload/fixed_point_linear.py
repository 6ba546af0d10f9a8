"""`--privacy tee --fixed-point`: the integers of the private modes, multiplied in the TEE.

The exact reference that `pad` and `shares` must equal, bit by bit. Shape suffixes: T tokens;
D input and F output features of a group; B bytes of a row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import Field
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pads import empty_rows
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import Group
from tsqp.tee.offload.offload import Linear, Ready
from tsqp.tee.placement import IN_TEE


class FixedPointLinear:
    """[P2] and [P3] around an exact product, with no pad and nobody to hide it from.

    Args:
        weights_FD: int8 of each group.
    """

    placement = IN_TEE

    def __init__(
        self,
        groups: Mapping[LinearGroup, Group[Any]],
        weights_FD: Mapping[LinearGroup, Tensor],
        dtype: torch.dtype,
        row_pool: RowPool,
    ) -> None:
        self._groups = groups
        self._weights_FD = weights_FD
        self._dtype = dtype
        self._row_pool = row_pool

    def start(self, request: Linear) -> Ready:
        group, weight_FD = self._groups[request.group], self._weights_FD[request.group]
        tokens = len(request.x_TD)
        field, each = group.field, group.field.residue_bytes
        c_TB = torch.empty(tokens, each * group.width, dtype=torch.uint8)
        z_TB = torch.empty(tokens, each * group.features, dtype=torch.uint8)
        x_TD = request.x_TD.float().contiguous()
        masked = group.mask(x_TD, _zeros(tokens, group.width, field), c_TB, self._row_pool)
        c_TD = torch.from_numpy(np.empty((tokens, group.width), field.dtype))
        z_TF = torch.empty(tokens, group.features, dtype=c_TD.dtype)
        residue_bytes.unpack(c_TB.numpy(), field, c_TD.numpy())
        residue_product(c_TD, weight_FD, field, z_TF)
        residue_bytes.pack(z_TF.numpy(), field, z_TB.numpy())
        y_TF = torch.empty(tokens, group.features)
        no_pad_TF = _zeros(tokens, group.features, field)
        group.check_and_unmask(z_TB, no_pad_TF, masked, y_TF, "This process", self._row_pool)
        return Ready(y_TF.to(self._dtype))

    def close(self) -> None:
        self._row_pool.close()


def _zeros(rows: int, residues: int, field: Field) -> NDArray[Any]:
    """Masks that hide nothing."""
    zeros = empty_rows(rows, residues, field)
    zeros[:] = 0
    return zeros
