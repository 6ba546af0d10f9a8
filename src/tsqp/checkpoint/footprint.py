"""How much memory the weights of each side take: docs/memory.md as code."""

import torch

from tsqp.checkpoint.quantize import group_shape, integer_bytes
from tsqp.checkpoint.weights import embedding_bytes, linear_bytes
from tsqp.model.config import ModelConfig, linear_groups

CHECK_BYTES = 8  # of check vectors, for each input and output feature of a group: two of int32


def trusted_bytes(
    config: ModelConfig, dtype: torch.dtype, privacy: str, *, fixed_point: bool = False
) -> int:
    """What the trusted side keeps of a model.

    Args:
        privacy: "tee", "pad", "shares" or "open".
        fixed_point: with "tee", that it computes in integers.
    """
    if privacy == "open":
        return 0
    if privacy == "tee" and not fixed_point:
        return float_bytes(config, dtype)
    checks = sum(CHECK_BYTES * sum(group_shape(config, *key)) for key in linear_groups(config))
    return integer_bytes(config) + checks + embedding_bytes(config, dtype)


def worker_bytes(config: ModelConfig, dtype: torch.dtype, serve: str) -> int:
    """What a worker keeps that serves "private", "open" or "all"."""
    integers = 0 if serve == "open" else integer_bytes(config)
    return integers + (0 if serve == "private" else float_bytes(config, dtype))


def float_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """All layers in floating point, and the embedding, which a tied output projection shares."""
    table = 0 if config.tie_word_embeddings else embedding_bytes(config, dtype)
    return linear_bytes(config, dtype) + table
