"""The worker's arithmetic.

Shape suffixes: T tokens; D input and F output features; B bytes; H query heads; J key/value heads;
K features of one head; S tokens kept of a sequence; M rows of the query heads of one group.

Inputs and outputs are in host memory, which is shared with the TEE or is about to be sent. With a
GPU they are copied to the device and back.
"""

import torch
from torch import Tensor

from tsqp.algebra import digits, int8_product, residue_bytes, words
from tsqp.algebra.params import FIELDS, Field
from tsqp.gpu import cuda_product


def prepare() -> None:
    """Compile the loops for products of residues and of seeds, before a client waits for them."""
    for field in FIELDS.values():
        digits.prepare(field)
        words.prepare(field)
        residue_bytes.prepare(field)
    int8_product.fast_product_is_exact()


def linear(x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
    """out = x · Wᵀ; x may lie on the device already."""
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


def attention_scores(q_THK: Tensor, k_JSK: Tensor, out_HTS: Tensor) -> None:
    """out = Q·Kᵀ of one sequence, where query head h meets key/value head h // (H/J)."""
    kv_heads, length, features = k_JSK.shape
    q_TJGK = q_THK.to(k_JSK.device).view(len(q_THK), kv_heads, -1, features)
    q_JMK = q_TJGK.permute(1, 2, 0, 3).reshape(kv_heads, -1, features)
    out_JMS = out_HTS.view(kv_heads, -1, length)
    if k_JSK.device.type == "cpu":
        torch.bmm(q_JMK, k_JSK.transpose(1, 2), out=out_JMS)
    else:
        out_JMS.copy_(torch.bmm(q_JMK, k_JSK.transpose(1, 2)))


def weighted_values(weights_HTS: Tensor, v_JSK: Tensor) -> Tensor:
    """P·V of one sequence, the heads concatenated: [T, H·K], on the device of the values."""
    kv_heads, length, features = v_JSK.shape
    rows = weights_HTS.shape[1]
    y_JMK = torch.bmm(weights_HTS.to(v_JSK.device).view(kv_heads, -1, length), v_JSK)
    return y_JMK.view(kv_heads, -1, rows, features).permute(2, 0, 1, 3).reshape(rows, -1)


def residue_product(c_TD: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
    """out = Wq · c mod p, exact, as rows of bytes [P9].

    Args:
        c_TD: of the field's dtype, in host memory; what is not a residue gives a wrong answer and
            no error.
        weight_FD: int8 in [-127, 127].
    """
    if weight_FD.device.type == "cpu":
        z_TF = torch.empty(len(c_TD), len(weight_FD), dtype=c_TD.dtype)
        int8_product.residue_product(c_TD, weight_FD, field, z_TF)
    else:
        z_TF = cuda_product.residue_product(c_TD.to(weight_FD.device), weight_FD, field).cpu()
    residue_bytes.pack(z_TF.numpy(), field, out_TB.numpy())
