"""The weights that the worker loads: linear layers and the embedding table. All are public."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsqp.checkpoint import integer_cache
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.footprint import float_bytes
from tsqp.checkpoint.prepared import PreparedFile
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.quantize import IntegerWeights, integer_bytes
from tsqp.checkpoint.weights import read_embedding, read_linear
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.gpu.backends.backend import Backend
from tsqp.model.config import ModelConfig, linear_groups, output_projection
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.layers import Layers


@dataclass(frozen=True)
class Weights:
    """The worker's tensors on its device.

    Attributes:
        backend: computes with them.
        linear_FD: the weight of each group.
        biases_F: of the groups that have one; they are for whole layers, elsewhere the TEE adds
            them.
        layers: norms and rotation, for whole layers.
        embedding_VD: the embedding table, which a tied output projection shares.
        digest: digest of every tensor of the model, as both sides compute it.
    """

    config: ModelConfig
    dtype: torch.dtype
    backend: Backend
    linear_FD: dict[LinearGroup, Tensor]
    biases_F: dict[LinearGroup, Tensor]
    layers: Layers
    embedding_VD: Tensor
    digest: str


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    backend: Backend,
    progress: Progress = silent,
) -> Weights:
    """Stream a checkpoint onto the device of `backend`, a block of rows at a time.

    Args:
        progress: called with the bytes done and their total.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
        OutOfMemory: the weights would not fit.
    """
    config = checkpoint.config
    tied = config.tie_word_embeddings
    device = backend.device
    required = float_bytes(config, dtype)
    backend.check_room(required, f"The weights of {checkpoint.name}")
    done = Counter(required, progress)
    digest = WeightsDigest()
    embedding = read_embedding(checkpoint, dtype, digest, device, multiplies=tied)
    done.add(embedding.nbytes)
    linear: dict[LinearGroup, Tensor] = {}
    biases: dict[LinearGroup, Tensor] = {}
    for group in linear_groups(config):
        if tied and group == output_projection(config):
            linear[group] = embedding
            continue
        weights = read_linear(checkpoint, group, dtype, digest, device)
        linear[group] = weights.weight_FD
        if weights.bias_F is not None:
            biases[group] = weights.bias_F.to(device)
        done.add(weights.nbytes)
    layers = Layers(checkpoint, dtype, digest, device)
    return Weights(config, dtype, backend, linear, biases, layers, embedding, digest.hexdigest())


@dataclass(frozen=True)
class IntegerModel:
    """The worker's weights in the private modes.

    Attributes:
        backend: computes with them.
        linear_FD: the int8 weight of each group.
        digest: digest of these and their scales, as both sides compute it.
    """

    backend: Backend
    linear_FD: dict[LinearGroup, Tensor]
    digest: str


def load_integers(
    checkpoint: Checkpoint,
    backend: Backend,
    progress: Progress = silent,
) -> IntegerModel:
    """Make or read the integer weights of a checkpoint, a group at a time; scales are dropped.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
        OutOfMemory: the weights would not fit.
    """
    backend.check_room(integer_bytes(checkpoint.config), f"The weights of {checkpoint.name}")
    linear: dict[LinearGroup, Tensor] = {}

    def place(group: LinearGroup, weights: IntegerWeights) -> None:
        linear[group] = weights.weight_FD.to(backend.device)

    digest = integer_cache.load_integers(checkpoint, place, progress)
    return IntegerModel(backend, linear, digest)


def read_prepared(path: Path, backend: Backend, progress: Progress = silent) -> IntegerModel:
    """Read what `tsqp prepare` wrote.

    Raises:
        CheckpointError: the file is not a prepared file, or was changed.
        OutOfMemory: the weights would not fit.
    """
    file = PreparedFile(path)
    try:
        backend.check_room(file.nbytes, f"The weights of {path}")
        linear = {
            group: weights.weight_FD.to(backend.device) for group, weights in file.groups(progress)
        }
        return IntegerModel(backend, linear, file.digest)
    finally:
        file.close()
