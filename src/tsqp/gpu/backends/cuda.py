"""A CUDA device: inputs are copied to it, and answers back. Shape suffixes as in `backend.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import Field
from tsqp.errors import OutOfMemory
from tsqp.gpu.backends import cuda_product, residues
from tsqp.gpu.backends.backend import group_queries, weigh_values
from tsqp.gpu.backends.fast_product import ResidueProduct, fast_product


class CudaBackend:
    """A `Backend` on one CUDA device. Its products, but not its memory, are tested on a CPU too."""

    name = "cuda"
    takes_memory_at_once = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._fast_product: ResidueProduct | None = None  # before `prepare`

    def prepare(self) -> None:
        residues.compile_loops()
        self._fast_product = fast_product(self.device)

    def free_bytes(self) -> int:
        available, _ = torch.cuda.mem_get_info(self.device)
        # What was freed here stays with torch, which gives it out again.
        held = torch.cuda.memory_reserved(self.device)
        return available + held - torch.cuda.memory_allocated(self.device)

    def check_room(self, required: int, what: str) -> None:
        available = self.free_bytes()
        if required > available:
            raise OutOfMemory(
                f"{what} would take {required} bytes, and {available} bytes are free "
                f"on {self.device}: free some, or choose a smaller dtype or model."
            )

    def linear(self, x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
        out_TF.copy_(x_TD.to(self.device) @ weight_FD.t())

    def embed(self, token_ids_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
        out_TD.copy_(table_VD[token_ids_T.to(self.device)])

    def attention_scores(self, q_THK: Tensor, k_JSK: Tensor, out_HTS: Tensor) -> None:
        kv_heads, length, _ = k_JSK.shape
        q_JMK = group_queries(q_THK.to(self.device), kv_heads)
        out_HTS.view(kv_heads, -1, length).copy_(torch.bmm(q_JMK, k_JSK.transpose(1, 2)))

    def weighted_values(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Tensor],
        weight_FD: Tensor,
        out_TF: Tensor,
    ) -> None:
        pairs = zip(weights, values, strict=True)
        rows = [weigh_values(w_HTS.to(self.device), v_JSK) for w_HTS, v_JSK in pairs]
        out_TF.copy_(torch.cat(rows) @ weight_FD.t())

    def residue_product(
        self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor
    ) -> None:
        if self._fast_product is None:
            self._multiply(residues.unpack(c_TB, field), weight_FD, field, out_TB)
            return
        z_TB = torch.empty(out_TB.shape, dtype=torch.uint8, device=self.device)
        self._fast_product(c_TB.to(self.device), weight_FD, field, z_TB)
        out_TB.copy_(z_TB)

    def seed_product(self, seed: bytes, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        c_TD = residues.expand(seed, len(out_TB), weight_FD.shape[1], field)
        if self._fast_product is None:
            self._multiply(c_TD, weight_FD, field, out_TB)
            return
        c_TB = torch.empty(len(c_TD), field.residue_bytes * c_TD.shape[1], dtype=torch.uint8)
        residue_bytes.pack(c_TD.numpy(), field, c_TB.numpy())
        self.residue_product(c_TB, weight_FD, field, out_TB)

    def _multiply(self, c_TD: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        """With library calls."""
        z_TF = cuda_product.residue_product(c_TD.to(self.device), weight_FD, field).cpu()
        residue_bytes.pack(z_TF.numpy(), field, out_TB.numpy())
