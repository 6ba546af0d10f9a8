"""The hints of lattice masks that are kept for the next start."""

import logging
from collections.abc import Mapping
from pathlib import Path

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.hints_file import SUFFIX as HINTS_SUFFIX
from tsqp.checkpoint.hints_file import new_hints_file
from tsqp.checkpoint.integer_cache import cached_file
from tsqp.errors import HintsError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.offload.lattice_load import LatticeLoad

log = logging.getLogger("tsqp")

MIN_WEIGHTS = 2**25  # smaller models keep no hints: making them takes a second or two


def hints_path(
    checkpoint: Checkpoint, shapes: Mapping[LinearGroup, tuple[int, int]]
) -> Path | None:
    """The file that keeps the hints of a model; None if making them takes little time.

    Args:
        shapes: (F, D) of each group.
    """
    weights = sum(features * width for features, width in shapes.values())
    return cached_file(checkpoint, HINTS_SUFFIX) if weights >= MIN_WEIGHTS else None


def keep_hints(path: Path, load: LatticeLoad, digest: str) -> None:
    """Write hints for the next start; a failure is only a warning.

    Args:
        digest: of the integer weights.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_hints_file(path, load.seed, list(load.hints)) as writer:
            for group, hints in load.hints.items():
                writer.add(group, hints)
            writer.digest = digest
    except (HintsError, OSError) as exc:
        log.warning("cannot keep hints in the cache: %s", exc)
