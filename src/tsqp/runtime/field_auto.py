"""Decides `--field auto`, and says why."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from tsqp.algebra.params import LATTICE, WIDE, Field
from tsqp.checkpoint.memory import available_bytes
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime.options import Options
from tsqp.tee.offload.field_choice import measure_costs

log = logging.getLogger("tsqp")


def with_cheaper_field(
    options: Options,
    name: str,
    needed: int,
    shapes: Mapping[LinearGroup, tuple[int, int]],
    pad_memory: int,
) -> Options:
    """The same options with the field that is used instead of `auto`; see `_cheaper_field`."""
    if options.privacy != "pad":
        log.info("field wide: auto measures only with --privacy pad")
        return replace(options, field=WIDE.name)
    field, hints = _cheaper_field(name, needed, shapes, pad_memory), options.hints
    if field is WIDE and hints is not None:
        log.info("the hints are not used")
        hints = None
    return replace(options, field=field.name, hints=hints)


def _cheaper_field(
    name: str, needed: int, shapes: Mapping[LinearGroup, tuple[int, int]], pad_memory: int
) -> Field:
    """The cheaper of pads and lattice masks on this machine, if the hints fit into memory.

    Args:
        name: of the model.
        needed: bytes of the TEE with lattice masks.
        shapes: (F, D) of each group.
        pad_memory: bytes for the stock of pads.
    """
    if needed > (available := available_bytes()):
        log.info(
            "field wide: the hints and all else of %s with lattice masks would take %d bytes, and "
            "%d are available", name, needed, available,
        )  # fmt: skip
        return WIDE
    costs = measure_costs(shapes, pad_memory)
    field = LATTICE if costs.lattice_is_cheaper else WIDE
    log.info(
        "field %s: a token takes %.3f ms of processor time for lattice masks and %.3f ms to use "
        "them, or %.3f ms for pads and %.3f ms to use them",
        field.name, 1e3 * costs.lattice_s, 1e3 * costs.lattice_loops_s, 1e3 * costs.pads_s,
        1e3 * costs.pad_loops_s,
    )  # fmt: skip
    return field
