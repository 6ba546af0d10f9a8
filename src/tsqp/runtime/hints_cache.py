"""The hints of lattice masks that are kept for the next start."""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.hints_file import SUFFIX as HINTS_SUFFIX
from tsqp.checkpoint.hints_file import HintsFile, new_hints_file
from tsqp.checkpoint.integer_cache import cached_file
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import HintsError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad

log = logging.getLogger("tsqp")

Loaded = TypeVar("Loaded")
Place = Callable[[LinearGroup, IntegerWeights], None]

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


def load_with_hints(
    path: Path | None,
    is_given: bool,
    new_load: Callable[..., LatticeLoad],
    read: Callable[[Place], tuple[str, Loaded]],
    row_pool: RowPool,
) -> tuple[LatticeLoad, tuple[str, Loaded]]:
    """Load for lattice masks with hints from a file, or made here and kept in the cache.

    Args:
        path: the file of hints; None for none.
        is_given: whether the user names it; else it is in the cache, and may not be there.
        new_load: makes a `LatticeLoad`, with arguments for the hints.
        read: passes all groups to a function; returns the digest of the weights, and more.

    Raises:
        HintsError: the given file holds no hints of these weights.
    """
    if path is not None and (is_given or path.exists()):
        try:
            with closing(HintsFile(path)) as file:
                find = lambda group, _: file.read(group)  # noqa: E731
                load = new_load(seed=file.seed, find=find, row_pool=row_pool)
                loaded = read(load.add)
                file.check_digest(loaded[0])
                return load, loaded
        except HintsError as exc:
            if is_given:
                raise
            log.warning("ignoring the hints in the cache: %s", exc)
    load = new_load()
    loaded = read(load.add)
    if path is not None:
        keep_hints(path, load, loaded[0])
    return load, loaded
