"""`--privacy tee --fixed-point`: the integers of the private modes, multiplied in the TEE.

The exact reference that `pad` and `shares` must equal, bit by bit. Shape suffixes: T tokens;
D input and F output features of a group; B bytes of a row.
"""

from collections.abc import Mapping

import numpy as np
import torch

from tsqp.algebra import residue_bytes
from tsqp.algebra.int8_product import residue_product
from tsqp.model.config import Key
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.base import Linear, Ready
from tsqp.tee.offload.masked import MaskedGroup
from tsqp.tee.placement import IN_TEE


class FixedPointLinear:
    """[P2] and [P3] around an exact product, with no pad and nobody to hide it from."""

    placement = IN_TEE

    def __init__(
        self, groups: Mapping[Key, MaskedGroup], dtype: torch.dtype, rows: RowPool
    ) -> None:
        self._groups = groups
        self._dtype = dtype
        self._rows = rows

    def start(self, request: Linear) -> Ready:
        group = self._groups[request.layer, request.group]
        tokens, each = len(request.x_TD), group.field.residue_bytes
        c_TB = torch.empty(tokens, each * group.width, dtype=torch.uint8)
        z_TB = torch.empty(tokens, each * group.features, dtype=torch.uint8)
        no_pad_TD = np.zeros((tokens, group.width), np.int32)
        masked = group.mask(request.x_TD.float(), no_pad_TD, c_TB, self._rows)
        c_TD = torch.empty(tokens, group.width, dtype=torch.int32)
        z_TF = torch.empty(tokens, group.features, dtype=torch.int32)
        residue_bytes.unpack(c_TB.numpy(), group.field, c_TD.numpy())
        residue_product(c_TD, group.weight_FD, group.field, z_TF)
        residue_bytes.pack(z_TF.numpy(), group.field, z_TB.numpy())
        no_pad_TF = np.zeros((tokens, group.features), np.int32)
        y_TF = torch.empty(tokens, group.features)
        group.unmask(z_TB, no_pad_TF, masked, y_TF, "This process", self._rows)
        return Ready(y_TF.to(self._dtype))

    def close(self) -> None:
        self._rows.close()
