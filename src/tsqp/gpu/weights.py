"""What the worker loads: linear weights and the embedding table, all of them public."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.errors import OutOfMemory
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import LAYER_GROUPS, ModelConfig
from tsqp.model.digest import WeightsDigest
from tsqp.model.weights import (
    check_memory,
    embedding_bytes,
    lay_out,
    linear_bytes,
    read_embedding,
    read_linear,
)


@dataclass(frozen=True)
class Weights:
    """The worker's tensors on its device.

    Attributes:
        linear_FD: weight by (layer, group); layer -1 is the output projection.
        embedding_VD: the embedding table, which a tied output projection shares.
        digest: of everything here, as both sides compute it.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    linear_FD: dict[tuple[int, str], Tensor]
    embedding_VD: Tensor
    digest: str


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """Stream a checkpoint onto `device`, one group of layers at a time.

    Biases go into the digest and are dropped: the TEE adds them.

    Args:
        progress: called with the layers done and their total.

    Raises:
        CheckpointError: a tensor is missing, cut short or of another shape.
        OutOfMemory: the weights would not fit.
    """
    config = checkpoint.config
    tied = config.tie_word_embeddings
    required = linear_bytes(config, dtype) + (0 if tied else embedding_bytes(config, dtype))
    if device.type == "cpu":
        check_memory(required, f"The weights of {checkpoint.name}")
    else:
        _check_device_memory(required, device, checkpoint.name)
    digest = WeightsDigest()
    table = read_embedding(checkpoint, dtype, digest)
    embedding = _place(table, device) if tied else table.to(device)  # only a product wants columns
    linear: dict[tuple[int, str], Tensor] = {}
    for layer in range(config.num_layers):
        for group in LAYER_GROUPS:
            weights = read_linear(checkpoint, layer, group, dtype, digest)
            linear[layer, group] = _place(weights.weight_FD, device)
        progress(layer + 1, config.num_layers)
    if tied:
        linear[-1, "lm_head"] = embedding
    else:
        head = read_linear(checkpoint, -1, "lm_head", dtype, digest)
        linear[-1, "lm_head"] = _place(head.weight_FD, device)
    return Weights(config, dtype, device, linear, embedding, digest.hexdigest())


def _check_device_memory(required: int, device: torch.device, name: str) -> None:
    available, _ = torch.cuda.mem_get_info(device)
    if required > available:
        raise OutOfMemory(
            f"The weights of {name} would take {required} bytes, and {available} bytes are free "
            f"on {device}: free some, or choose a smaller dtype or model."
        )


def _place(weight: Tensor, device: torch.device) -> Tensor:
    return lay_out(weight) if device.type == "cpu" else weight.to(device)
