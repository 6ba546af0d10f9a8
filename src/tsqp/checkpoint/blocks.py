"""Reads large tensors a few rows at a time, so that converting one never needs a second copy."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tsqp.algebra.fixed_point import row_blocks
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.memory import give_back
from tsqp.errors import CheckpointError


def read_blocks(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """One tensor of a checkpoint in `dtype`, from its first row to its last.

    Each block is contiguous and finite, and belongs to the caller. Numbers that are not finite are
    refused because they would cause errors that depend on which tokens a prompt contains.

    Raises:
        CheckpointError: there is no such tensor, it is cut short, has another shape, or holds
            a number that is not finite in `dtype`.
    """
    blocks = row_blocks(shape[0], math.prod(shape[1:]))
    for rows in blocks:
        stored = checkpoint.read(name, shape, rows)
        converted = stored.to(dtype).contiguous()
        if not _is_finite(converted):
            raise _not_finite(checkpoint, name, stored, dtype)
        yield rows, converted
    if len(blocks) > 1:
        give_back()


def _is_finite(block: Tensor) -> bool:
    if block.numel() == 0:
        return True
    least, most = torch.aminmax(block)  # many times as fast as isfinite; NaN makes both NaN
    return bool(least.isfinite() and most.isfinite())


def _not_finite(
    checkpoint: Checkpoint, name: str, stored: Tensor, dtype: torch.dtype
) -> CheckpointError:
    if _is_finite(stored):
        what = str(dtype).removeprefix("torch.")
        return CheckpointError(
            f"Tensor {name} of {checkpoint.name} holds numbers too large for {what}: use another"
            " --dtype."
        )
    return CheckpointError(
        f"Tensor {name} of {checkpoint.name} holds NaN or infinity: fetch the checkpoint again."
    )
