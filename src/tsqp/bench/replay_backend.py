"""A replay worker, for benchmarks only: it answers every call with zeros and multiplies nothing.

It answers at once, or after the time that a simulated GPU would take.

Zeros are the right answer if the weights are zeros (`zero_model`), so the trusted side masks and
checks as it always does. With other weights, the checks refuse them. No option of `tsqp worker`
starts a replay worker, and its digest is that of a model of zeros, which no other session accepts.
"""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.bench.simulated_gpu import Gpu, wait_until
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.shard_digests import ShardDigests
from tsqp.checkpoint.weights import check_memory
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.gpu.backends.backend import HostBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import IntegerModel, Weights
from tsqp.model.config import linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import WHOLE, Shard
from tsqp.wire.call_limit import CALL_MACS

NAME = "replay"  # the device that a replay worker announces


class ReplayBackend(HostBackend):
    """A `tsqp.gpu.backends.backend.Backend` that writes zeros. Its weights have only a shape.

    Args:
        gpu: whose times it takes; None to take no more time than it needs.
    """

    name = NAME
    device = torch.device("cpu")
    takes_memory_at_once = False

    def __init__(self, gpu: Gpu | None = None) -> None:
        self._gpu = gpu

    def prepare(self) -> None:
        pass

    def free_bytes(self) -> int:
        return available_bytes()

    def check_room(self, required: int, what: str) -> None:
        check_memory(required, what)

    def linear(self, x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
        self._answer(weight_FD, x_TD.nbytes, None, out_TF)

    def embed(self, token_ids_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
        self._answer(table_VD[:0], token_ids_T.nbytes, None, out_TD)  # which multiplies nothing

    def attention_scores(self, q_THK: Tensor, k_JSK: Tensor, out_HTS: Tensor) -> None:
        raise NotImplementedError("a replay worker keeps no keys and values")

    def weighted_values(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Tensor],
        weight_FD: Tensor,
        out_TF: Tensor,
    ) -> None:
        raise NotImplementedError("a replay worker keeps no keys and values")

    def residue_product(
        self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor
    ) -> None:
        self._answer(weight_FD, c_TB.nbytes, field, out_TB)

    def seed_product(self, seed: bytes, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        self._answer(weight_FD, len(seed), field, out_TB)

    def _answer(self, weight_FD: Tensor, sent_bytes: int, field: Field | None, out: Tensor) -> None:
        began = perf_counter()
        out.zero_()
        if self._gpu is not None:
            crossing = sent_bytes + out.nbytes
            features, width = weight_FD.shape
            wait_until(began + self._gpu.product_s(len(out), features, width, crossing, field))


def replay_worker(
    checkpoint: Checkpoint, dtype: torch.dtype, backend: ReplayBackend, shard: Shard = WHOLE
) -> Worker:
    """A worker with the shapes and digests of a model, for private modes and for `open` in `dtype`.

    With a shard of a model it serves private modes only. Its limit for one call is that of a GPU.
    """
    config = checkpoint.config
    digests = ShardDigests(shard.count)
    digest = load_integers(checkpoint, digests.add)
    groups = linear_groups(config)
    if not shard.is_whole:
        digest = digests.hexdigests()[shard.number - 1]
        integers = IntegerModel(backend, _shapes(groups, torch.int8, shard), digest, shard)
        return Worker(None, integers, max_call_macs=CALL_MACS["cuda"])
    integers = IntegerModel(backend, _shapes(groups, torch.int8), digest)
    embedding_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device="meta")
    floats = Weights(
        config,
        dtype,
        backend,
        _shapes(groups, dtype),
        embedding_VD,
        weights_digest(checkpoint, dtype),
        WHOLE,
    )
    return Worker(floats, integers, max_call_macs=CALL_MACS["cuda"])


def _shapes(
    groups: Sequence[LinearGroup], dtype: torch.dtype, shard: Shard = WHOLE
) -> dict[LinearGroup, Tensor]:
    """For each group a tensor of the shard's shape, without memory."""
    return {
        group: torch.empty(shard.size_of(group), group.width, dtype=dtype, device="meta")
        for group in groups
    }
