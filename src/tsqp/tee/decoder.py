"""The forward pass of all families, written once for every mode.

It is a generator: it yields what it wants computed elsewhere and is resumed with the answer. An
answer may lie in memory shared with the worker and is valid only until the next request has been
started, so what is needed for longer is the result of an operation, in fresh memory.

Shape suffixes: T tokens of all sequences, flat; R rows whose logits are wanted; V vocabulary;
D hidden features; F output features of a linear layer; H query heads; J key/value heads; N heads
of both sorts; K features of one head.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.errors import WorkerError
from tsqp.model import ops
from tsqp.model.attention import Segment
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import FINAL_NORM, layer_norms
from tsqp.model.digest import WeightsDigest
from tsqp.model.rotary import Rotary
from tsqp.model.weights import norm_weight, read_norm
from tsqp.tee.offload.base import LM_HEAD, Attention, Embedding, Linear, Request
from tsqp.tee.stats import Stats

Tables = tuple[Tensor, Tensor]  # cosines and sines


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences, flat.

    Attributes:
        token_ids_T: int64.
        positions_T: int64, the position of each token in its own sequence.
        segments: which sequence the tokens belong to, in order.
        logits_rows_R: int64, the rows of T whose logits are wanted; may be empty.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    segments: Sequence[Segment]
    logits_rows_R: Tensor


class Decoder:
    """Holds the norms and the rotary frequencies; every large weight belongs to the offload."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, digest: WeightsDigest | None = None
    ) -> None:
        """Read the norms, and add them to `digest`."""
        config = self._config = checkpoint.config

        def read(name: str) -> Tensor:
            return norm_weight(config, read_norm(checkpoint, name, dtype, digest))

        self._norms = [
            {use: read(name) for use, name in layer_norms(config, layer).items()}
            for layer in range(config.num_layers)
        ]
        self._final_norm_D = read(FINAL_NORM)
        ropes = {layer.rope for layer in config.layers if layer.rope is not None}
        self._rotary = {rope: Rotary(rope, config.head_dim) for rope in ropes}
        self._embedding_scale = torch.tensor(config.embedding_multiplier, dtype=dtype)
        self._gated = ops.GATED[config.hidden_act]

    def forward(self, batch: Batch, stats: Stats) -> Generator[Request, Tensor, Tensor]:
        """One pass over a batch.

        Returns:
            logits_RV, float32, private memory, finite.

        Raises:
            WorkerError: a logit is not finite.
        """
        config, time, rows_R = self._config, stats.time, batch.logits_rows_R
        eps = config.rms_norm_eps

        x_TD = (yield Embedding(batch.token_ids_T)) * self._embedding_scale
        with time("rope"):
            tables = {
                rope: rotary.tables(batch.positions_T, batch.segments, x_TD.dtype)
                for rope, rotary in self._rotary.items()
            }

        for layer, norms in enumerate(self._norms):
            with time("norm"):
                h_TD = ops.rms_norm(x_TD, norms["attention"], eps)
            qkv_TF = yield Linear(layer, "qkv", h_TD)
            with time("rope"):
                rope = config.layers[layer].rope
                q_THK, k_TJK, v_TJK = self._heads(qkv_TF, norms, tables[rope] if rope else None)
            y_TD = yield Attention(layer, q_THK, k_TJK, v_TJK, batch.segments)
            if layer == config.num_layers - 1:  # only wanted rows matter from here on
                if rows_R.numel() == 0:
                    return torch.empty(0, config.vocab_size)
                x_TD, y_TD = x_TD[rows_R], y_TD[rows_R]
            o_TD = yield Linear(layer, "o", y_TD)
            with time("norm"):
                self._add(x_TD, o_TD, norms.get("attention_out"))
                h_TD = ops.rms_norm(x_TD, norms["mlp"], eps)
            gate_up_TF = yield Linear(layer, "gate_up", h_TD)
            with time("activation"):
                h_TI = self._gated(gate_up_TF)
            down_TD = yield Linear(layer, "down", h_TI)
            with time("norm"):
                self._add(x_TD, down_TD, norms.get("mlp_out"))

        with time("norm"):
            h_RD = ops.rms_norm(x_TD, self._final_norm_D, eps)
        logits_RV = (yield Linear(LM_HEAD, "lm_head", h_RD)).to(torch.float32, copy=True)
        if not logits_RV.isfinite().all():
            raise WorkerError(
                "The lm_head output of this step is not finite, so no token can be chosen: check"
                " the worker, or try a dtype with a wider range."
            )
        if config.logits_scaling != 1:
            logits_RV /= config.logits_scaling
        cap = config.logits_softcap
        return logits_RV if cap is None else ops.soft_cap(logits_RV, cap)

    def _heads(
        self, qkv_TF: Tensor, norms: dict[str, Tensor], tables: Tables | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head; the first two normed and rotated, where they are."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv_TNK = qkv_TF.view(-1, heads + 2 * kv_heads, self._config.head_dim)
        qk_TNK, v_TJK = qkv_TNK.tensor_split([heads + kv_heads], dim=1)
        if self._config.qk_norm:
            eps = self._config.rms_norm_eps
            q_THK, k_TJK = qk_TNK.tensor_split([heads], dim=1)
            both = ops.rms_norm(q_THK, norms["q"], eps), ops.rms_norm(k_TJK, norms["k"], eps)
            qk_TNK = torch.cat(both, dim=1)
        if tables is not None:
            qk_TNK = ops.rope(qk_TNK, *tables)
        q_THK, k_TJK = qk_TNK.tensor_split([heads], dim=1)
        return q_THK, k_TJK, v_TJK

    def _add(self, x_TD: Tensor, branch_TD: Tensor, norm_D: Tensor | None) -> None:
        """Add what attention or MLP gave to the residual stream, in place."""
        if norm_D is not None:
            branch_TD = ops.rms_norm(branch_TD, norm_D, self._config.rms_norm_eps)
        x_TD.add_(branch_TD, alpha=self._config.residual_multiplier)
