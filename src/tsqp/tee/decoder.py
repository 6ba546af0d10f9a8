"""The forward pass of all families, written once for every mode.

It is a generator: it yields requests for operations that run elsewhere, and is resumed with their
results. A result may be in memory shared with the worker, and is valid only until the next request
has been started. Values that are needed longer are results of operations, in fresh memory.

Shape suffixes: T tokens of all sequences, flat; R rows whose logits are wanted; M either of them: T
rows up to the last layer's attention, R rows after it; V vocabulary; D hidden features; I features
inside the MLP; F output features of a linear layer; H query heads; J key/value heads; K features of
one head.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import WorkerError
from tsqp.model.config import layer_groups, output_projection
from tsqp.nn import ops
from tsqp.nn.attention import Segment
from tsqp.nn.layers import Layers
from tsqp.tee.offload.offload import Attention, Embedding, Layer, Linear, Request
from tsqp.tee.placement import IN_TEE, Placement
from tsqp.tee.split_attention import split_attention
from tsqp.tee.stats import Stats


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences, flat.

    Attributes:
        token_ids_T: int64.
        positions_T: int64, the position of each token in its own sequence.
        segments: which sequence the tokens belong to, in order.
        logits_rows_R: int64, the rows of T whose logits are wanted, ascending; may be empty.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    segments: Sequence[Segment]
    logits_rows_R: Tensor


class Decoder:
    """The model without its large weights, which belong to the offload.

    Args:
        layers: the layers of the same model, if they have been read already.
        placement, most_scores: the offload's attributes of these names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        layers: Layers | None = None,
        placement: Placement = IN_TEE,
        most_scores: int = 0,
    ) -> None:
        config = self._config = checkpoint.config
        self._layers = Layers(checkpoint, dtype) if layers is None else layers
        self._groups = [layer_groups(config, layer) for layer in range(config.num_layers)]
        self._lm_head = output_projection(config)
        self._placement = placement
        self.most_scores = most_scores
        self._embedding_scale = torch.tensor(config.embedding_multiplier, dtype=dtype)

    def forward(self, batch: Batch, stats: Stats) -> Generator[Request, Tensor, Tensor]:
        """One pass over a batch.

        Returns:
            logits_RV, float32, private memory, finite.

        Raises:
            WorkerError: a logit is not finite.
        """
        config, time = self._config, stats.time
        run = self._fused_layers if self._placement.fuses_layers else self._run_layers

        x_TD = (yield Embedding(batch.token_ids_T)) * self._embedding_scale
        x_RD = yield from run(x_TD, batch, stats)
        if len(x_RD) == 0:
            return torch.empty(0, config.vocab_size)
        with time("norm"):
            h_RD = self._layers.final_norm(x_RD)
        logits_RV = (yield Linear(self._lm_head, h_RD)).to(torch.float32, copy=True)
        if not logits_RV.isfinite().all():
            raise WorkerError(
                "The lm_head output of this step is not finite, so no token can be chosen: check"
                " the worker, or try a dtype with a wider range."
            )
        if config.logits_scaling != 1:
            logits_RV /= config.logits_scaling
        cap = config.logits_softcap
        return logits_RV if cap is None else ops.soft_cap(logits_RV, cap)

    def _run_layers(
        self, x_TD: Tensor, batch: Batch, stats: Stats
    ) -> Generator[Request, Tensor, Tensor]:
        """The residual stream after the last layer, x_RD.

        `layers.add` changes it in place; in some families it norms what it adds first.
        """
        config, layers, time = self._config, self._layers, stats.time
        rows_R = batch.logits_rows_R

        with time("rope"):
            tables = layers.tables(batch.positions_T, batch.segments)

        x_MD = x_TD
        for layer, groups in enumerate(self._groups):
            with time("norm"):
                h_TD = layers.norm(layer, "attention", x_MD)
            qkv_TF = yield Linear(groups.qkv, h_TD)
            with time("rope"):
                q_THK, k_TJK, v_TJK = layers.heads(layer, qkv_TF, tables)
            attention = Attention(layer, q_THK, k_TJK, v_TJK, batch.segments)
            if layer < config.num_layers - 1:
                o_MD = yield from self._attend_and_project(attention, None, stats)
            else:  # from here on, only the wanted rows are needed
                o_MD = yield from self._attend_and_project(attention, rows_R, stats)
                x_MD = x_MD[rows_R]
                if len(x_MD) == 0:
                    return x_MD
            with time("norm"):
                layers.add(layer, "attention", x_MD, o_MD)
                h_MD = layers.norm(layer, "mlp", x_MD)
            gate_up_MF = yield Linear(groups.gate_up, h_MD)
            with time("activation"):
                h_MI = layers.gated(gate_up_MF)
            down_MD = yield Linear(groups.down, h_MI)
            with time("norm"):
                layers.add(layer, "mlp", x_MD, down_MD)
        return x_MD

    def _fused_layers(
        self, x_TD: Tensor, batch: Batch, stats: Stats
    ) -> Generator[Request, Tensor, Tensor]:
        """The same as `_run_layers`, if whole layers run on the worker."""
        for layer in range(self._config.num_layers):
            x_TD = yield Layer(layer, x_TD, batch.segments)
        return x_TD[batch.logits_rows_R]

    def _attend_and_project(
        self, attention: Attention, wanted_R: Tensor | None, stats: Stats
    ) -> Generator[Request, Tensor, Tensor]:
        """Attention and the layer's output projection o, for all rows or only the wanted rows."""
        if self._placement.splits_attention:
            return (
                yield from split_attention(
                    attention, self._config, wanted_R, self.most_scores, stats
                )
            )
        y_MD = yield attention
        if wanted_R is not None:
            y_MD = y_MD[wanted_R]
        return (yield Linear(self._groups[attention.layer].o, y_MD)) if len(y_MD) else y_MD
