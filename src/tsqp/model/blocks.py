"""Large tensors, a few rows at a time: nobody holds a second copy of one for converting it."""

import math
from collections.abc import Iterator

from torch import Tensor

from tsqp.algebra.fixed_point import row_blocks
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.memory import give_back


def read_blocks(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[slice, Tensor]]:
    """One tensor of a checkpoint, from its first row to its last.

    Raises:
        CheckpointError: there is no such tensor, it is cut short, or has another shape.
    """
    blocks = row_blocks(shape[0], math.prod(shape[1:]))
    for rows in blocks:
        yield rows, checkpoint.read(name, shape, rows)
    if len(blocks) > 1:
        give_back()
