"""Sessions of the private modes around a few small groups: no model, no engine, real links.

The groups have odd sizes, so that tensors in shared memory have gaps between them.
"""

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsqp.algebra.params import LATTICE, Field
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import PRIVATE_ABILITIES, Worker
from tsqp.gpu.worker_weights import IntegerModel
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.freivalds import FailureLimit, Trust
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pad_providers import DirectProvider
from tsqp.tee.crypto.pads import row_bytes_in_stock
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.tee.offload.masked import MaskedGroup
from tsqp.tee.offload.offload import Linear
from tsqp.tee.offload.pad import PadLinear
from tsqp.tee.offload.shares import SharesLinear
from tsqp.wire.channel import Channel
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.messages import Hello
from tsqp.wire.server import Server

QKV = LinearGroup(0, "qkv", 5, 7)
DOWN = LinearGroup(0, "down", 7, 19)
HEAD = LinearGroup(None, "lm_head", 33, 7)
SHAPES = {group: group.shape for group in (QKV, DOWN, HEAD)}
DIGEST = "cd" * 32
TIMEOUT_S = 30.0
ROW_BYTES = 4 * sum(map(sum, SHAPES.values()))


def small_weights() -> dict[LinearGroup, IntegerWeights]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in SHAPES.items():
        weight_FD = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        weight_FD[:, 0] = 127  # as quantised rows have somewhere
        weights[key] = IntegerWeights(weight_FD, torch.rand(shape[0], generator=generator) + 0.5)
    return weights


WEIGHTS = small_weights()


def small_worker() -> Worker:
    """A worker of the private modes."""
    weights_FD = {key: weights.weight_FD for key, weights in WEIGHTS.items()}
    return Worker(None, IntegerModel(CpuBackend(), weights_FD, DIGEST))


def hello(shm_bytes: int = 0) -> Hello:
    return Hello(secrets.token_bytes(32), DIGEST, "int8", PRIVATE_ABILITIES, shm_bytes)


def _groups(field: Field) -> dict[LinearGroup, MaskedGroup]:
    return {key: MaskedGroup(key, weights, None, field) for key, weights in WEIGHTS.items()}


def pad_linear(
    channel: Channel, field: Field, *, stock_rows: int = 50, failures: FailureLimit | None = None
) -> PadLinear[Any]:
    """`pad` over a channel, with pads, or with lattice masks where the field is theirs."""
    trust, rows = Trust(failures or FailureLimit()), RowPool(2)
    if field is LATTICE:
        load = LatticeLoad(SHAPES, {})
        for key, weights in WEIGHTS.items():
            load.add(key, weights)
        row_bytes = sum(row_bytes_in_stock(LATTICE, *shape) for shape in SHAPES.values())
        memory = stock_rows * row_bytes
        pool = PadPool(load.provider(memory), SHAPES, memory)
        return PadLinear(channel, load.groups[0][0], pool, torch.float32, TIMEOUT_S, rows, trust)
    weights_FD = {key: weights.weight_FD for key, weights in WEIGHTS.items()}
    pool = PadPool(DirectProvider(weights_FD, field), SHAPES, stock_rows * ROW_BYTES)
    return PadLinear(channel, _groups(field), pool, torch.float32, TIMEOUT_S, rows, trust)


def shares_linear(
    channels: Sequence[Channel], field: Field, *, failures: FailureLimit | None = None
) -> SharesLinear:
    """`shares` over channels."""
    trust, rows = Trust(failures or FailureLimit()), RowPool(2)
    return SharesLinear(channels, _groups(field), torch.float32, TIMEOUT_S, rows, trust)


def ask(linear: PadLinear[Any] | SharesLinear, group: LinearGroup, x_TD: Tensor) -> Tensor:
    """A private copy of the answer to one request."""
    with linear.start(Linear(group, x_TD)) as y_TF:
        return y_TF.clone()


@contextmanager
def serving(folder: Path, workers: int) -> Iterator[list[Endpoint]]:
    """Workers in threads, each with its own socket."""
    stop = threading.Event()
    with ExitStack() as stack:
        endpoints = []
        for number in range(workers):
            server = Server(parse_endpoint(f"ipc://{folder}/{number}.sock"))
            thread = threading.Thread(target=_serve, args=(server, stop))
            thread.start()
            stack.callback(thread.join, TIMEOUT_S)
            endpoints.append(parse_endpoint(server.address))
        stack.callback(stop.set)
        yield endpoints


def _serve(server: Server, stop: threading.Event) -> None:
    server.serve(small_worker(), stop.is_set)
    server.close()


def connect(endpoint: Endpoint, shm_bytes: int = 2**20) -> RemoteChannel:
    """A session, over shared memory unless `shm_bytes` is 0."""
    return RemoteChannel(endpoint, hello(shm_bytes), connect_timeout=TIMEOUT_S)
