"""The operations of a layer between its linear layers and attention, for both sides.

Shape suffixes: T tokens of all sequences, flat; D hidden, I inner and F output features; H query
heads; J key/value heads; N heads of both sorts; K features of one head.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.weights import norm_weight, read_norm
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.model.config import FINAL_NORM, layer_norms
from tsqp.model.rope import Rope
from tsqp.nn import ops
from tsqp.nn.attention import Segment
from tsqp.nn.norms import CompiledNorm, Norm, torch_norm
from tsqp.nn.rotary import Rotary

CPU = torch.device("cpu")

Tables = Mapping[Rope, tuple[Tensor, Tensor]]  # cosines and sines by way of rotating


class Layers:
    """The norms and the rotary frequencies of all layers, without the large weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        digest: WeightsDigest | None = None,
        device: torch.device = CPU,
        *,
        compiled: bool = False,
    ) -> None:
        """Read the norms, and add them to `digest`.

        Args:
            compiled: compute norms by `CompiledNorm`; on the CPU only.
        """
        config = self._config = checkpoint.config
        self._dtype = dtype
        self._device = device

        def read(name: str) -> Norm:
            weight_D = norm_weight(config, read_norm(checkpoint, name, dtype, digest))
            if compiled:
                return CompiledNorm(weight_D, config.rms_norm_eps)
            return torch_norm(weight_D.to(device), config.rms_norm_eps)

        self._norms = [
            {use: read(name) for use, name in layer_norms(config, layer).items()}
            for layer in range(config.num_layers)
        ]
        self.final_norm = read(FINAL_NORM)  # gives the input of the output projection
        ropes = {layer.rope for layer in config.layers if layer.rope is not None}
        self._rotary = {rope: Rotary(rope, config.head_dim) for rope in ropes}
        self._gated = ops.GATED[config.hidden_act]

    def tables(self, positions_T: Tensor, segments: Sequence[Segment]) -> Tables:
        """The tables that `heads` needs to rotate these tokens."""
        found = {
            rope: rotary.tables(positions_T, segments, self._dtype)
            for rope, rotary in self._rotary.items()
        }
        return {rope: (c.to(self._device), s.to(self._device)) for rope, (c, s) in found.items()}

    def norm(self, layer: int, use: str, x_TD: Tensor) -> Tensor:
        """The normed input of "attention" or "mlp"."""
        return self._norms[layer][use](x_TD)

    def heads(self, layer: int, qkv_TF: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """q_THK, k_TJK and v_TJK; q and k are normed and rotated if the model does so."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        norms, rope = self._norms[layer], self._config.layers[layer].rope
        qkv_TNK = qkv_TF.view(-1, heads + 2 * kv_heads, self._config.head_dim)
        qk_TNK, v_TJK = qkv_TNK.tensor_split([heads + kv_heads], dim=1)
        if self._config.qk_norm:
            q_THK, k_TJK = qk_TNK.tensor_split([heads], dim=1)
            qk_TNK = torch.cat((norms["q"](q_THK), norms["k"](k_TJK)), dim=1)
        if rope is not None:
            qk_TNK = ops.rope(qk_TNK, *tables[rope])
        q_THK, k_TJK = qk_TNK.tensor_split([heads], dim=1)
        return q_THK, k_TJK, v_TJK

    def gated(self, gate_up_TF: Tensor) -> Tensor:
        """h_TI, the input of "down"."""
        return self._gated(gate_up_TF)

    def add(self, layer: int, use: str, x_TD: Tensor, branch_TD: Tensor) -> None:
        """Add the output of "attention" or "mlp" to x in place; some families norm it first."""
        norm = self._norms[layer].get(f"{use}_out")
        if norm is not None:
            branch_TD = norm(branch_TD)
        x_TD.add_(branch_TD, alpha=self._config.residual_multiplier)
