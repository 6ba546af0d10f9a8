"""The processor. Shape suffixes as in `backend.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.algebra import int8_product, residue_bytes
from tsqp.algebra.params import Field
from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.weights import check_memory
from tsqp.gpu.backends import residues
from tsqp.gpu.backends.backend import HostBackend, group_queries, weigh_values


class CpuBackend(HostBackend):
    """A `Backend` whose device memory is host memory, so that products are written in place."""

    name = "cpu"
    device = torch.device("cpu")
    takes_memory_at_once = False

    def prepare(self) -> None:
        residues.compile_loops()
        int8_product.fast_product_is_exact()

    def free_bytes(self) -> int:
        return available_bytes()

    def check_room(self, required: int, what: str) -> None:
        check_memory(required, what)

    def linear(self, x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
        torch.mm(x_TD, weight_FD.t(), out=out_TF)

    def embed(self, token_ids_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
        torch.index_select(table_VD, 0, token_ids_T, out=out_TD)

    def attention_scores(self, q_THK: Tensor, k_JSK: Tensor, out_HTS: Tensor) -> None:
        kv_heads, length, _ = k_JSK.shape
        out_JMS = out_HTS.view(kv_heads, -1, length)
        torch.bmm(group_queries(q_THK, kv_heads), k_JSK.transpose(1, 2), out=out_JMS)

    def weighted_values(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Tensor],
        weight_FD: Tensor,
        out_TF: Tensor,
    ) -> None:
        rows = [weigh_values(w_HTS, v_JSK) for w_HTS, v_JSK in zip(weights, values, strict=True)]
        self.linear(torch.cat(rows), weight_FD, out_TF)

    def residue_product(
        self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor
    ) -> None:
        self._multiply(residues.unpack(c_TB, field), weight_FD, field, out_TB)

    def seed_product(self, seed: bytes, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        c_TD = residues.expand(seed, len(out_TB), weight_FD.shape[1], field)
        self._multiply(c_TD, weight_FD, field, out_TB)

    def _multiply(self, c_TD: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        z_TF = torch.empty(len(c_TD), len(weight_FD), dtype=c_TD.dtype)
        int8_product.residue_product(c_TD, weight_FD, field, z_TF)
        residue_bytes.pack(z_TF.numpy(), field, out_TB.numpy())
