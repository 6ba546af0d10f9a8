"""The worker's arithmetic. Shape suffixes: T tokens, D input features, F output features.

Inputs and outputs lie in host memory, shared with the TEE or about to be sent; on a GPU they are
copied to the device and back.
"""

import torch
from torch import Tensor


def linear(x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
    """out = x · Wᵀ."""
    if weight_FD.device.type == "cpu":
        torch.mm(x_TD, weight_FD.t(), out=out_TF)
    else:
        out_TF.copy_(x_TD.to(weight_FD.device) @ weight_FD.t())


def embed(token_ids_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
    """Rows of the table. The ids lie in [0, V): the caller has checked a private copy of them."""
    if table_VD.device.type == "cpu":
        torch.index_select(table_VD, 0, token_ids_T, out=out_TD)
    else:
        out_TD.copy_(table_VD[token_ids_T.to(table_VD.device)])
