"""The forward pass of the Llama family, written once for every mode.

It is a generator: it yields what it wants computed elsewhere and is resumed with the answer. An
answer may lie in memory shared with the worker and is valid only until the next request has been
started, so what is needed for longer is the result of an operation, in fresh memory.

Shape suffixes: T tokens of all sequences, flat; R rows whose logits are wanted; V vocabulary;
D hidden features; F output features of a linear layer; H query heads; J key/value heads;
K features of one head.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.errors import WorkerError
from tsqp.model import ops
from tsqp.model.attention import Segment
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.weights import read_norm
from tsqp.tee.offload.base import LM_HEAD, Attention, Embedding, Linear, Request
from tsqp.tee.stats import Stats


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

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        config = self._config = checkpoint.config
        prefixes = [f"model.layers.{layer}" for layer in range(config.num_layers)]
        self._norms = [
            (
                read_norm(checkpoint, f"{prefix}.input_layernorm.weight", dtype),
                read_norm(checkpoint, f"{prefix}.post_attention_layernorm.weight", dtype),
            )
            for prefix in prefixes
        ]
        self._final_norm_D = read_norm(checkpoint, "model.norm.weight", dtype)
        self._frequency_h = ops.rope_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )

    def forward(self, batch: Batch, stats: Stats) -> Generator[Request, Tensor, Tensor]:
        """One pass over a batch.

        Returns:
            logits_RV, float32, private memory, finite.

        Raises:
            WorkerError: a logit is not finite.
        """
        eps, time, rows_R = self._config.rms_norm_eps, stats.time, batch.logits_rows_R

        x_TD = (yield Embedding(batch.token_ids_T)).clone()
        with time("rope"):
            cos, sin = ops.rope_tables(batch.positions_T, self._frequency_h, x_TD.dtype)

        for layer, (attention_norm_D, mlp_norm_D) in enumerate(self._norms):
            with time("norm"):
                h_TD = ops.rms_norm(x_TD, attention_norm_D, eps)
            qkv_TF = yield Linear(layer, "qkv", h_TD)
            with time("rope"):
                qk_TNK, v_TJK = self._split(qkv_TF)
                q_THK, k_TJK = ops.rope(qk_TNK, cos, sin).tensor_split([self._config.num_heads], 1)
            y_TD = yield Attention(layer, q_THK, k_TJK, v_TJK, batch.segments)
            if layer == self._config.num_layers - 1:  # only wanted rows matter from here on
                if rows_R.numel() == 0:
                    return torch.empty(0, self._config.vocab_size)
                x_TD, y_TD = x_TD[rows_R], y_TD[rows_R]
            o_TD = yield Linear(layer, "o", y_TD)
            with time("norm"):
                x_TD += o_TD
                h_TD = ops.rms_norm(x_TD, mlp_norm_D, eps)
            gate_up_TF = yield Linear(layer, "gate_up", h_TD)
            with time("activation"):
                h_TI = ops.silu_mul(gate_up_TF)
            down_TD = yield Linear(layer, "down", h_TI)
            with time("norm"):
                x_TD += down_TD

        with time("norm"):
            h_RD = ops.rms_norm(x_TD, self._final_norm_D, eps)
        logits_RV = (yield Linear(LM_HEAD, "lm_head", h_RD)).to(torch.float32, copy=True)
        if not logits_RV.isfinite().all():
            raise WorkerError(
                "The lm_head output of this step is not finite, so no token can be chosen: check"
                " the worker, or try a dtype with a wider range."
            )
        return logits_RV

    def _split(self, qkv_TF: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys together (they rotate alike), and the values."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv_TNK = qkv_TF.view(-1, heads + 2 * kv_heads, self._config.head_dim)
        qk_TNK, v_TJK = qkv_TNK.tensor_split([heads + kv_heads], dim=1)
        return qk_TNK, v_TJK
