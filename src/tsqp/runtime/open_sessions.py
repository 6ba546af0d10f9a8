"""What begins the sessions of `open`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tsqp.gpu.worker import ATTENTION_ABILITY, LAYER_ABILITY
from tsqp.model.config import ModelConfig
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.kv_cache import KvCache
from tsqp.runtime.failover import Begin
from tsqp.runtime.options import Options
from tsqp.runtime.shard_layout import in_order_of_shards
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.offload.offload import Offload
from tsqp.tee.offload.open import OpenOffload
from tsqp.tee.offload.open_attention import OpenAttentionOffload
from tsqp.tee.offload.open_layers import OpenLayersOffload
from tsqp.wire.channel import Channel

Connect = Callable[[WorkerProcess, Sequence[str]], Channel]  # to a worker with these abilities


def begins_with_own_kv(
    options: Options,
    config: ModelConfig,
    dtype: torch.dtype,
    biases_F: Mapping[LinearGroup, Tensor],
    kv: KvCache,
    alternatives: Sequence[Sequence[WorkerProcess]],
    connect: Connect,
) -> list[Begin]:
    """Sessions whose keys and values stay on this side.

    Args:
        alternatives: each is one worker of the whole model, or one for each shard.
    """

    def begin(workers: Sequence[WorkerProcess]) -> tuple[Offload, None]:
        channels = in_order_of_shards([connect(worker, []) for worker in workers])
        return OpenOffload(channels, config, dtype, biases_F, options.timeout, kv), None

    return [partial(begin, workers) for workers in alternatives]


def begins_with_remote_kv(
    options: Options,
    config: ModelConfig,
    dtype: torch.dtype,
    biases_F: Mapping[LinearGroup, Tensor],
    workers: Sequence[WorkerProcess],
    connect: Connect,
) -> list[Begin]:
    """Sessions whose keys and values are on the worker, for its attention or whole layers."""
    kind: type[OpenAttentionOffload | OpenLayersOffload] = OpenAttentionOffload
    abilities = [ATTENTION_ABILITY]
    if options.fuse_layers:
        kind, abilities = OpenLayersOffload, [LAYER_ABILITY]

    def begin(worker: WorkerProcess) -> tuple[Offload, None]:
        channel = connect(worker, abilities)
        return kind(channel, config, dtype, biases_F, options.timeout), None

    return [partial(begin, worker) for worker in workers]
