"""How much memory the weights of each side take. Implements the table in docs/memory.md."""

import torch

from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.residue_blocks import BLOCK
from tsqp.checkpoint.quantize import integer_bytes
from tsqp.checkpoint.weights import embedding_bytes, linear_bytes
from tsqp.model.config import ModelConfig, linear_groups
from tsqp.model.shard import WHOLE, Shard

CHECK_BYTES = 8  # bytes of check vectors for each input and output feature of a group: two of int32
LATTICE_CHECK_BYTES = (
    20  # the same for both checks of lattice masks: two of float64, and one of int32
)
HINT_BYTES = LATTICE.residue_bytes * DEGREE  # for each output feature, in blocks of features


def trusted_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    privacy: str,
    *,
    fixed_point: bool = False,
    lattice: bool = False,
    alternatives: int = 1,
) -> int:
    """Bytes of a model's weights in the TEE.

    Args:
        privacy: "tee", "pad", "shares" or "open".
        fixed_point: with "tee", that it computes in integers.
        lattice: with "pad", that masks are lattice masks.
        alternatives: with "pad", the number of workers, each with check vectors of its own.
    """
    if privacy == "open":
        return 0
    if privacy == "tee" and not fixed_point:
        return float_bytes(config, dtype)
    groups = linear_groups(config)
    features = sum(group.features + group.width for group in groups)
    if privacy == "pad" and lattice:
        # The integers of one group at a time, until its hints are made.
        passing = max(group.features * group.width for group in groups)
        checks = LATTICE_CHECK_BYTES * features * alternatives
        return hint_bytes(config) + passing + checks + embedding_bytes(config, dtype)
    checks = CHECK_BYTES * features * alternatives
    return integer_bytes(config) + checks + embedding_bytes(config, dtype)


def hint_bytes(config: ModelConfig) -> int:
    """Hints of all groups, and the public polynomials of the widest [P10]."""
    groups = linear_groups(config)
    polynomials = [*(group.features for group in groups), max(group.width for group in groups)]
    return HINT_BYTES * sum(-(-count // BLOCK) * BLOCK for count in polynomials)


def worker_bytes(config: ModelConfig, dtype: torch.dtype, serve: str, shard: Shard = WHOLE) -> int:
    """Bytes of a shard's weights on a worker that serves "private", "open" or "all"."""
    integers = 0 if serve == "open" else integer_bytes(config, shard)
    floats = float_bytes(config, dtype) if shard.is_whole else shard_bytes(config, dtype, shard)
    return integers + (0 if serve == "private" else floats)


def shard_bytes(config: ModelConfig, dtype: torch.dtype, shard: Shard) -> int:
    """A shard in floating point: its features of every group, and its columns of the embedding."""
    weights = sum(shard.size_of(group) * group.width for group in linear_groups(config))
    columns = shard.rows(config.hidden_size)
    embedding = config.vocab_size * int(columns.stop - columns.start)
    return int(dtype.itemsize) * (weights + embedding)


def float_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """All layers in floating point, and the embedding, which a tied output projection shares."""
    table = 0 if config.tie_word_embeddings else embedding_bytes(config, dtype)
    return linear_bytes(config, dtype) + table
