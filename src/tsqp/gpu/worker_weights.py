"""The weights that the worker loads: linear layers and the embedding table. All are public."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsqp.checkpoint import integer_cache
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.footprint import float_bytes, shard_bytes
from tsqp.checkpoint.prepared import PreparedFile
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.quantize import (
    IntegerWeights,
    add_to_digest,
    integer_bytes,
    quantize_all,
)
from tsqp.checkpoint.shard_digests import read_columns, read_shard
from tsqp.checkpoint.weights import empty_matrix, place_rows, read_embedding, read_linear
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.gpu.backends.backend import Backend
from tsqp.model.config import ModelConfig, linear_groups, output_projection
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import WHOLE, Shard, check_divisible
from tsqp.nn.layers import Layers


@dataclass(frozen=True)
class Weights:
    """The worker's tensors on its device.

    Attributes:
        backend: computes with them.
        linear_FD: the weight of each group, or the shard's rows of it.
        embedding_VD: the embedding table, which a tied output projection shares, or the shard's
            columns of it.
        digest: digest of every tensor of the model, or of the shard, as both sides compute it.
        shard: which part of the model it is.
    """

    config: ModelConfig
    dtype: torch.dtype
    backend: Backend
    linear_FD: dict[LinearGroup, Tensor]
    embedding_VD: Tensor
    digest: str
    shard: Shard


@dataclass(frozen=True)
class ModelWeights(Weights):
    """The weights of a whole model, which can run whole layers.

    Attributes:
        biases_F: of the groups that have one; they are for whole layers, elsewhere the TEE adds
            them.
        layers: norms and rotation, for whole layers.
    """

    biases_F: dict[LinearGroup, Tensor]
    layers: Layers


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    backend: Backend,
    progress: Progress = silent,
) -> ModelWeights:
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
    found = digest.hexdigest()
    return ModelWeights(config, dtype, backend, linear, embedding, found, WHOLE, biases, layers)


def load_shard(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    backend: Backend,
    shard: Shard,
    progress: Progress = silent,
) -> Weights:
    """Stream a shard onto the device of `backend`; nothing else of the checkpoint is read.

    The embedding is an exception: a file holds its columns row by row.

    Raises:
        CheckpointError, OutOfMemory: see `load_weights`.
    """
    config, device = checkpoint.config, backend.device
    required = shard_bytes(config, dtype, shard)
    backend.check_room(required, f"The weights of {checkpoint.name}")
    done = Counter(required, progress)
    digest = WeightsDigest()
    columns = shard.rows(config.hidden_size)
    width = columns.stop - columns.start
    embedding = torch.empty(config.vocab_size, width, dtype=dtype, device=device)
    for rows, block in read_columns(checkpoint, columns, dtype, digest):
        embedding[rows] = block.to(device)
    done.add(embedding.nbytes)
    linear: dict[LinearGroup, Tensor] = {}
    for group in linear_groups(config):
        weight_FD = empty_matrix(shard.size_of(group), group.width, dtype, device)
        for rows, block in read_shard(checkpoint, group, shard, dtype, digest):
            place_rows(weight_FD, rows, block)
        linear[group] = weight_FD
        done.add(weight_FD.nbytes)
    return Weights(config, dtype, backend, linear, embedding, digest.hexdigest(), shard)


@dataclass(frozen=True)
class IntegerModel:
    """The worker's weights in the private modes.

    Attributes:
        backend: computes with them.
        linear_FD: the int8 weight of each group, or the shard's rows of it.
        digest: digest of these and their scales, as both sides compute it.
        shard: which part of the model it is.
    """

    backend: Backend
    linear_FD: dict[LinearGroup, Tensor]
    digest: str
    shard: Shard = WHOLE


def load_integers(
    checkpoint: Checkpoint,
    backend: Backend,
    progress: Progress = silent,
    shard: Shard = WHOLE,
) -> IntegerModel:
    """Make or read the integer weights of a checkpoint, a group at a time; scales are dropped.

    A part of the model is always made anew; the cache is for whole models.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
        OutOfMemory: the weights would not fit.
    """
    required = integer_bytes(checkpoint.config, shard)
    backend.check_room(required, f"The weights of {checkpoint.name}")
    if not shard.is_whole:
        return _shard_of(quantize_all(checkpoint, progress, shard), shard, backend)
    linear: dict[LinearGroup, Tensor] = {}

    def place(group: LinearGroup, weights: IntegerWeights) -> None:
        linear[group] = weights.weight_FD.to(backend.device)

    digest = integer_cache.load_integers(checkpoint, place, progress)
    return IntegerModel(backend, linear, digest)


def _shard_of(
    groups: Iterable[tuple[LinearGroup, IntegerWeights]], shard: Shard, backend: Backend
) -> IntegerModel:
    digest, linear = WeightsDigest(), {}
    for group, weights in groups:
        add_to_digest(digest, group, weights, shard)
        linear[group] = weights.weight_FD.to(backend.device)
    return IntegerModel(backend, linear, digest.hexdigest(), shard)


def read_prepared(
    path: Path, backend: Backend, progress: Progress = silent, shard: Shard = WHOLE
) -> IntegerModel:
    """Read what `tsqp prepare` wrote, or a shard of it.

    Raises:
        CheckpointError: the file is not a prepared file, or was changed. A change is not noticed
            here if only a shard is read, but then the TEE refuses the digest.
        UnsupportedModel: the model has too few features for so many shards.
        OutOfMemory: the weights would not fit.
    """
    file = PreparedFile(path)
    try:
        backend.check_room(file.part_bytes(shard), f"The weights of {path}")
        if not shard.is_whole:
            check_divisible(file.linear_groups(), shard.count)
            return _shard_of(file.part(shard, progress), shard, backend)
        linear = {
            group: weights.weight_FD.to(backend.device) for group, weights in file.groups(progress)
        }
        return IntegerModel(backend, linear, file.digest)
    finally:
        file.close()
