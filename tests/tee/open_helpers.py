"""`open` with a worker in this process, in each way of splitting a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.weights import read_bias
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_weights
from tsqp.model.config import linear_groups
from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch, Decoder
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.offload.offload import Offload
from tsqp.tee.offload.open_attention import OpenAttentionOffload
from tsqp.tee.offload.open_layers import OpenLayersOffload
from tsqp.tee.stats import Stats
from tsqp.wire.channel import InprocChannel
from tsqp.wire.messages import Hello
from tsqp.wire.tensors import WEIGHTS_DTYPES

OFFLOADS = {"attention": OpenAttentionOffload, "layer": OpenLayersOffload}


class Side:
    """A trusted side of its own on a worker, and what crosses between them.

    Args:
        most_bytes: of one call.
    """

    def __init__(
        self, worker: Worker, checkpoint: Checkpoint, split: str, most_bytes: int = 2**40
    ) -> None:
        assert worker._weights is not None
        weights = worker._weights
        hello = Hello(
            bytes(32), weights.digest, WEIGHTS_DTYPES[weights.dtype], ("linear", split), 0
        )
        config = checkpoint.config
        self.channel = InprocChannel(worker, hello)
        self.channel.max_call_bytes = most_bytes
        biases = {
            group: bias_F
            for group in linear_groups(config)
            if (bias_F := read_bias(checkpoint, group, weights.dtype)) is not None
        }
        self.offload: Offload = OFFLOADS[split](self.channel, config, weights.dtype, biases, 1.0)
        self.decoder = Decoder(
            checkpoint, weights.dtype, None, self.offload.placement, self.offload.most_scores
        )
        self.stats = Stats()

    def logits(
        self, parts: Sequence[tuple[int, int, Sequence[int]]], wanted: Sequence[int] | None = None
    ) -> Tensor:
        """Logits of one batch.

        Args:
            parts: sequence, start and token ids.
            wanted: rows; all, unless given.
        """
        return self.lanes([parts], wanted)[0]

    def lanes(
        self,
        batches: Sequence[Sequence[tuple[int, int, Sequence[int]]]],
        wanted: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Logits of several batches that take turns."""
        lanes = [self.decoder.forward(batch_of(parts, wanted), self.stats) for parts in batches]
        return run_interleaved(self.offload, lanes, self.stats)


def batch_of(
    parts: Sequence[tuple[int, int, Sequence[int]]], wanted: Sequence[int] | None = None
) -> Batch:
    token_ids = [token for _, _, ids in parts for token in ids]
    positions = [start + i for _, start, ids in parts for i in range(len(ids))]
    segments = [Segment(sequence, start, len(ids)) for sequence, start, ids in parts]
    rows = range(len(token_ids)) if wanted is None else wanted
    return Batch(
        torch.tensor(token_ids),
        torch.tensor(positions),
        segments,
        torch.tensor(list(rows), dtype=torch.int64),
    )


def make_worker(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Worker:
    return Worker(load_weights(checkpoint, dtype, CpuBackend()))
