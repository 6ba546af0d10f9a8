"""How much memory the stock of pads or lattice masks may take."""

import logging
from collections.abc import Mapping

from tsqp.algebra.params import DEGREE, LATTICE, Field
from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.weights import check_memory
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.lattice import rows_of_a_class
from tsqp.tee.crypto.pads import row_bytes_in_stock

log = logging.getLogger("tsqp")

MAX_DIRECT = 2 * 2**30
PART = 4  # a quarter of the free memory


def pad_memory(
    wanted: int | None,
    field: Field,
    shapes: Mapping[LinearGroup, tuple[int, int]],
    to_read: int = 0,
) -> int:
    """Bytes for the stock: by default a quarter of the free memory, but no more than is of use.

    Pads may take MAX_DIRECT. Lattice masks are cheapest in whole batches, of which one is used
    while the other is made, so they may take two batches of every group [P14].

    Args:
        wanted: bytes, by `--pad-memory`.
        shapes: (F, D) of each group.
        to_read: bytes of hints and weights that will still be read.

    Raises:
        OutOfMemory: there are not as many bytes as wanted.
    """
    if wanted is not None:
        check_memory(wanted, "The stock of pads", "choose a smaller --pad-memory")
        return wanted
    part = max(0, available_bytes() - to_read) // PART
    return min(whole_stock(shapes) if field is LATTICE else MAX_DIRECT, part)


def whole_stock(shapes: Mapping[LinearGroup, tuple[int, int]]) -> int:
    """Bytes of two whole batches of lattice masks of every group."""
    return 2 * DEGREE * sum(row_bytes_in_stock(LATTICE, *shape) for shape in shapes.values())


def say_if_limited(shapes: Mapping[LinearGroup, tuple[int, int]], memory: int) -> None:
    """Log what the default is if memory is too short for whole batches of lattice masks."""
    if memory < (whole := whole_stock(shapes)):
        log.info(
            "the stock of lattice masks takes a quarter of the free memory, %d bytes, so %d rows "
            "are made at once; whole batches of %d take the least time and need %d bytes, see "
            "--pad-memory", memory, rows_of_a_class(shapes, memory), DEGREE, whole,
        )  # fmt: skip
