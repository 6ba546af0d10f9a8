"""Integer weights on disk: what `tsqp prepare` writes, and the cache that makes a start fast.

A prepared file is a safetensors file of int8 weights and float32 scales, named by layer and group,
with the digest of all of them in its header. It is written beside its place and then renamed, and
nothing that was read from it is used before the digest has been computed again. The digest is no
signature: whoever can write the TEE's disk can change the model, here as in the checkpoint itself.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from tsqp.errors import CheckpointError
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import linear_groups
from tsqp.model.demo import cache_folder, locate
from tsqp.model.digest import WeightsDigest
from tsqp.model.files import bytes_of
from tsqp.model.quantize import (
    IntegerWeights,
    Progress,
    add_to_digest,
    group_shape,
    quantize_all,
    tensor_names,
)
from tsqp.model.safetensors_file import SafetensorsFile

log = logging.getLogger("tsqp")

FORMAT = "tsqp-prepared-1"
SUFFIX = ".tsqp.safetensors"
_KEY = re.compile(r"(?:layers\.(\d{1,4})\.([a-z_]{1,16})|lm_head)\.weight\Z")

Key = tuple[int, str]
Groups = Iterator[tuple[Key, IntegerWeights]]


class PreparedFile:
    """A prepared file that is open.

    Attributes:
        name: what people called the model that it was made from.
        digest: as its header has it; true only once `groups` has ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = SafetensorsFile(path)
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            self._file.close()
            raise CheckpointError(
                f"{path} is not a prepared file of this version; write it with `tsqp prepare`."
            )
        self.name = metadata.get("model", "")[:200]
        self.digest = metadata.get("digest", "")

    def keys(self) -> list[Key]:
        """(layer, group) of all groups, as the file has them."""
        found = [match for name in self._file.names() if (match := _KEY.match(name))]
        return [(int(m[1]), m[2]) if m[1] else (-1, "lm_head") for m in found]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self._file.nbytes

    def groups(self, progress: Progress = lambda done, total: None) -> Groups:
        """All groups; nothing may be used before the iterator has ended.

        Raises:
            CheckpointError: cut short, malformed, or its digest is not that of its contents.
        """
        digest = WeightsDigest()
        keys = self.keys()
        for number, key in enumerate(keys, 1):
            weight_name, scale_name = tensor_names(*key)
            shape = self._file.shape(weight_name)
            if len(shape) != 2:
                raise self._changed()
            weight_FD = self._file.read(weight_name, shape, stored="I8")
            scale_F = self._file.read(scale_name, shape[:1], stored="F32")
            weights = IntegerWeights(weight_FD, scale_F)
            add_to_digest(digest, *key, weights)
            yield key, weights
            progress(number, len(keys))
        if digest.hexdigest() != self.digest:
            raise self._changed()

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} was changed after it was written, or is damaged; write it again with"
            " `tsqp prepare`."
        )


def write_prepared(
    checkpoint: Checkpoint,
    path: Path,
    groups: Groups | None = None,
    *,
    model_name: str,
    progress: Progress = lambda done, total: None,
) -> str:
    """Write a prepared file, all at once or not at all, and return its digest.

    Args:
        groups: as `quantize_all` gives them; None computes them one at a time.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the file not be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    digest = WeightsDigest()
    header, places = _layout(checkpoint, model_name)
    try:
        try:
            with temporary.open("xb") as file:
                file.truncate(len(header) + max(end for _, end in places.values()))
                for key, weights in groups or quantize_all(checkpoint, progress):
                    add_to_digest(digest, *key, weights)
                    tensors = (weights.weight_FD, weights.scale_F)
                    for name, tensor in zip(tensor_names(*key), tensors, strict=True):
                        file.seek(len(header) + places[name][0])
                        file.write(bytes_of(tensor))
                file.seek(0)
                file.write(header.replace(_NO_DIGEST.encode(), digest.hexdigest().encode()))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        hint = "free some space" if exc.errno == errno.ENOSPC else "choose another place"
        raise CheckpointError(f"Cannot write {path}: {exc.strerror}; {hint}.") from exc
    return digest.hexdigest()


_NO_DIGEST = "0" * 64  # in its place until it is known


def _layout(checkpoint: Checkpoint, model_name: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header with no digest yet, and where each tensor begins and ends after it."""
    entries: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "model": model_name, "digest": _NO_DIGEST}
    }
    places = {}
    start = 0
    for key in linear_groups(checkpoint.config):
        features, width = group_shape(checkpoint.config, *key)
        shapes = (("I8", [features, width], features * width), ("F32", [features], features * 4))
        for name, (dtype, shape, length) in zip(tensor_names(*key), shapes, strict=True):
            places[name] = (start, start + length)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": places[name]}
            start += length
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def load_integers(
    model: str,
    checkpoint: Checkpoint,
    place: Callable[[Key, IntegerWeights], None],
    progress: Progress = lambda done, total: None,
) -> str:
    """Give every group of a model to `place`, from the cache where it is there; fills the cache.

    `place` may get a group a second time, where the cache turns out to be damaged at its end:
    only what it got last counts, and nothing before this returns.

    Returns:
        the digest of all of them.

    Raises:
        CheckpointError: the checkpoint cannot be used. A cache that cannot is passed over.
    """
    path = _cached_file(model)
    if path is not None and path.exists():
        try:
            return _place_all(path, place, progress)
        except CheckpointError as exc:
            log.warning("passing over the cache: %s", exc)

    def placed() -> Groups:
        for key, weights in quantize_all(checkpoint, progress):
            place(key, weights)
            yield key, weights

    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return write_prepared(checkpoint, path, placed(), model_name=checkpoint.name)
        except (CheckpointError, OSError) as exc:
            log.warning("keeping no cache: %s", exc)
    digest = WeightsDigest()
    for key, weights in placed():
        add_to_digest(digest, *key, weights)
    return digest.hexdigest()


def _place_all(path: Path, place: Callable[[Key, IntegerWeights], None], progress: Progress) -> str:
    file = PreparedFile(path)
    try:
        for key, weights in file.groups(progress):
            place(key, weights)
        return file.digest
    finally:
        file.close()


def _cached_file(model: str) -> Path | None:
    """Where the integers of a model's files are kept; a changed checkpoint has another place."""
    if model.startswith("random:"):
        return None  # made anew each time, and never written to disk
    path = locate() if model == "demo" else Path(model).expanduser()
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.json")]
    stats = {str(file.resolve()): file.stat() for file in files}
    parts = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())
    key = hashlib.sha256(json.dumps([FORMAT, parts]).encode()).hexdigest()[:32]
    return cache_folder() / "prepared" / f"{key}{SUFFIX}"
