"""The cache that makes a second start fast: a prepared file for each state of a checkpoint.

A state is identified by the inode, times and size of each file and by pages from all over it.
Hashing the whole file would take longer than reading the cache. Inodes and times are not enough,
because read-only images and enclaves make them up. The device number is left out, because it
changes whenever a container starts.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.demo_model import cache_folder
from tsqp.checkpoint.encrypted_file import EncryptedFile
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.prepared import (
    FORMAT,
    SUFFIX,
    Groups,
    PreparedFile,
    WriteError,
    write_prepared,
)
from tsqp.checkpoint.progress import Progress, silent
from tsqp.checkpoint.quantize import IntegerWeights, add_to_digest, quantize_all
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.errors import CheckpointError
from tsqp.model.config import linear_groups
from tsqp.model.linear_group import LinearGroup

log = logging.getLogger("tsqp")

PAGES = 1024  # looked at in each file
PAGE_BYTES = 4096


def load_integers(
    checkpoint: Checkpoint,
    place: Callable[[LinearGroup, IntegerWeights], None],
    progress: Progress = silent,
) -> str:
    """Pass every group of a model to `place`, from the cache if possible; fills the cache.

    `place` may get a group a second time, if the cache turns out to be damaged at its end. Only the
    last version counts, and none may be used before this function returns.

    Returns:
        the digest of all groups.

    Raises:
        CheckpointError: the checkpoint cannot be used. A cache that cannot be used is ignored.
    """
    path = cached_file(checkpoint)
    if path is not None and path.exists():
        try:
            return _place_all(path, checkpoint, place, progress)
        except CheckpointError as exc:
            log.warning("passing over the cache: %s", exc)

    def place_each() -> Groups:
        for group, weights in quantize_all(checkpoint, progress):
            place(group, weights)
            yield group, weights

    digest = WeightsDigest()
    groups = place_each()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_prepared(checkpoint, path, groups, digest)
            if cached_file(checkpoint) != path:  # the files were changed while they were read
                path.unlink(missing_ok=True)
        except (WriteError, OSError) as exc:
            log.warning("keeping no cache: %s", exc)
    for group, weights in groups:  # those that have not been written
        add_to_digest(digest, group, weights)
    return digest.hexdigest()


def _place_all(
    path: Path,
    checkpoint: Checkpoint,
    place: Callable[[LinearGroup, IntegerWeights], None],
    progress: Progress,
) -> str:
    """Place what the file holds, which must be the groups of this model."""
    groups = {group: group for group in linear_groups(checkpoint.config)}
    file = PreparedFile(path)
    try:
        shapes = {group: group.shape for group in groups}
        if {group: group.shape for group in file.linear_groups()} != shapes:
            raise CheckpointError(f"{path} was made from another model.")
        for group, weights in file.groups(progress):
            place(groups[group], weights)
        return file.digest
    finally:
        file.close()


def cached_file(checkpoint: Checkpoint, ending: str = SUFFIX) -> Path | None:
    """Where what is made of a checkpoint is kept, by its ending; a changed one has another place.

    It depends on the files that are open, not on what their names lead to now. None if nothing may
    be kept.
    """
    sources = checkpoint.sources
    if not sources:
        return None  # made anew each time, and never written to disk
    if any(isinstance(file, EncryptedFile) for file in sources.values()):
        return None  # the disk may not see what these files hold
    try:
        states = {str(file.resolved_path): _state(file) for file in set(sources.values())}
        folder = cache_folder()
    except (OSError, CheckpointError) as exc:
        log.warning("using no cache: %s", exc)
        return None
    folder_of_all = os.path.commonpath([file.path.parent for file in sources.values()])
    places = {name: str(file.path.relative_to(folder_of_all)) for name, file in sources.items()}
    told = json.dumps([FORMAT, repr(checkpoint.config), places, states], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:32]
    return folder / "prepared" / f"{key}{ending}"


def _state(file: BinaryFile) -> tuple[int, int, int, int, str]:
    """Identifies the contents of a file without reading all of them."""
    stat = file.stat()
    pages = hashlib.sha256()
    for place in range(0, file.size, max(PAGE_BYTES, file.size // PAGES)):
        pages.update(file.read(place, min(PAGE_BYTES, file.size - place)))
    return stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, file.size, pages.hexdigest()
