"""Reads large tensors a few rows at a time, so that converting one never needs a second copy."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tsqp.algebra.fixed_point import row_blocks
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.memory import give_back
from tsqp.errors import CheckpointError
from tsqp.model.linear_group import LinearGroup


def read_blocks(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    some: slice | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """One tensor of a checkpoint in `dtype`, from its first row to its last.

    Each block is contiguous and finite, and belongs to the caller. Numbers that are not finite are
    refused because they would cause errors that depend on which tokens a prompt contains.

    Args:
        shape: of the whole tensor.
        some: the rows to read; None for all.

    Raises:
        CheckpointError: there is no such tensor, it is cut short, has another shape, or holds
            a number that is not finite in `dtype`.
    """
    first, stop = (0, shape[0]) if some is None else (some.start, some.stop)
    blocks = row_blocks(stop, math.prod(shape[1:]), first)
    for rows in blocks:
        stored = checkpoint.read(name, shape, rows)
        converted = stored.to(dtype).contiguous()
        if not _is_finite(converted):
            raise _not_finite(checkpoint, name, stored, dtype)
        yield rows, converted
    if len(blocks) > 1:
        give_back()


def read_rows(
    checkpoint: Checkpoint, group: LinearGroup, rows: slice, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Some output features of a group's weight, and where each block lies among them.

    Raises:
        CheckpointError: see `read_blocks`.
    """
    start = 0
    for part, some in group.pieces(rows):
        shape = part.out_features, group.width
        for _, block in read_blocks(checkpoint, f"{part.name}.weight", shape, dtype, some):
            yield slice(start, start + len(block)), block
            start += len(block)


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
