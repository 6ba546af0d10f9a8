"""Integer weights on disk: what `tsqp prepare` writes, and what the cache holds.

A prepared file is a safetensors file of int8 weights and float32 scales, named by layer and group,
with the digest of all of them in its header. It gets its name only when it is complete, and nothing
that was read from it is used before the digest has been computed again. The digest is not a
signature: whoever can write the TEE's disk can change the model, here as in the checkpoint itself.
"""

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tsqp.algebra.fixed_point import are_quantized_rows
from tsqp.algebra.params import MAX_WIDTH
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.encrypted_file import EncryptedModel
from tsqp.checkpoint.files import BinaryFile, bytes_of
from tsqp.checkpoint.new_file import new_file
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.checkpoint.quantize import (
    IntegerWeights,
    add_to_digest,
    quantize_all,
)
from tsqp.checkpoint.safetensors_file import SafetensorsFile
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.errors import CheckpointError, UsageError, printable_path
from tsqp.model.config import linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import WHOLE, Shard

FORMAT = "tsqp-prepared-1"
SUFFIX = ".tsqp.safetensors"
_WEIGHT = re.compile(r"(?:layers\.(0|[1-9][0-9]{0,3})\.([a-z_]{1,16})|lm_head)\.weight\Z")

Groups = Iterator[tuple[LinearGroup, IntegerWeights]]


class WriteError(CheckpointError):
    """A prepared file cannot be written. The checkpoint is not at fault."""


class PreparedFile:
    """A prepared file that is open.

    Attributes:
        name: the name of the model that it was made from.
        digest: the digest in its header; verified only once `groups` has ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = SafetensorsFile(BinaryFile(path))
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            self._file.close()
            raise CheckpointError(
                f"{path} is not a prepared file of this version; write it with `tsqp prepare`."
            )
        self.name = metadata.get("model", "")[:200]
        self.digest = metadata.get("digest", "")

    def linear_groups(self) -> list[LinearGroup]:
        """The groups in the order of the file. They have no parts.

        Raises:
            CheckpointError: a weight is not a matrix, or too wide.
        """
        matches = (_WEIGHT.match(name) for name in self._file.names())
        return [self._group(match) for match in matches if match]

    def _group(self, match: re.Match[str]) -> LinearGroup:
        shape = self._file.shape(match[0])
        if len(shape) != 2 or shape[1] > MAX_WIDTH:
            raise self._changed()
        layer, name = (int(match[1]), match[2]) if match[1] else (None, "lm_head")
        return LinearGroup(layer, name, *shape)

    @property
    def layers(self) -> int:
        """The number of layers in the file."""
        return len({group.layer for group in self.linear_groups()} - {None})

    def part_bytes(self, shard: Shard = WHOLE) -> int:
        """Bytes of a shard's integers and scales."""
        return sum(shard.size_of(group) * (group.width + 4) for group in self.linear_groups())

    def groups(self, progress: Progress = silent) -> Groups:
        """All groups. None may be used before the iterator has ended.

        Args:
            progress: called after each group with the bytes done and their total.

        Raises:
            CheckpointError: the file is truncated or malformed, or its digest does not match.
        """
        digest = WeightsDigest()
        for group, weights in self.part(WHOLE, progress):
            add_to_digest(digest, group, weights)
            yield group, weights
        if digest.hexdigest() != self.digest:
            raise self._changed()

    def part(self, shard: Shard, progress: Progress = silent) -> Groups:
        """A shard's features of all groups; nothing else is read.

        The digest in the header is of the whole file, so it is not verified. The caller must
        compare the digest of what it reads with that of somebody who has the model.

        Args:
            progress: called after each group with the bytes done and their total.

        Raises:
            CheckpointError: the file is truncated or malformed.
        """
        groups = [(group, shard.rows_of(group)) for group in self.linear_groups()]
        done = Counter(self.part_bytes(shard), progress)
        for group, rows in groups:
            weight_name, scale_name = group.integer_names
            weight_FD = self._file.read(weight_name, group.shape, stored="I8", rows=rows)
            scale_F = self._file.read(scale_name, (group.features,), stored="F32", rows=rows)
            if not are_quantized_rows(weight_FD, scale_F):
                raise CheckpointError(
                    f"{self._path} holds integers or scales for {weight_name} that TSQP does not"
                    " make; write it again with `tsqp prepare`."
                )
            weights = IntegerWeights(weight_FD, scale_F)
            yield group, weights
            done.add(weights.nbytes)

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self._path} was changed after it was written, or is damaged; write it again with"
            " `tsqp prepare`."
        )


def prepare(model: str, path: Path, progress: Progress = silent) -> str:
    """Write the prepared file of a model ahead of time, and return its digest.

    Args:
        path: a new file whose name ends in SUFFIX.
        progress: called with the bytes done and their total.

    Raises:
        UsageError: the path is taken or has another ending, or the model is encrypted.
        CheckpointError: the checkpoint cannot be used, or the file not be written.
    """
    if not path.name.endswith(SUFFIX):
        raise UsageError(
            f"{printable_path(path, 'OUT')} must end in {SUFFIX}; workers recognise prepared files "
            "by this ending."
        )
    if path.exists():
        raise UsageError(f"{path} exists; name a new file, or remove it.")
    try:
        checkpoint = open_checkpoint(model)
    except EncryptedModel as exc:
        raise UsageError(
            f"{printable_path(model)} is encrypted, and a prepared file would hold its weights in "
            "plain: prepare the model that it was made from."
        ) from exc
    digest = WeightsDigest()
    try:
        write_prepared(checkpoint, path, quantize_all(checkpoint, progress), digest)
    finally:
        checkpoint.close()
    return digest.hexdigest()


def write_prepared(
    checkpoint: Checkpoint, path: Path, groups: Groups, digest: WeightsDigest
) -> None:
    """Write a prepared file, completely or not at all.

    Args:
        groups: as `quantize_all` gives them.
        digest: an empty digest; every group that is taken from `groups` is added to it.

    Raises:
        WriteError: the file cannot be written. The remaining `groups` can still be taken.
        CheckpointError: raised by `groups`.
    """
    header, places = _layout(checkpoint)
    try:
        with new_file(path, SUFFIX) as file:
            file.truncate(len(header) + max(end for _, end in places.values()))
            for group, weights in groups:
                add_to_digest(digest, group, weights)
                tensors = (weights.weight_FD, weights.scale_F)
                for name, tensor in zip(group.integer_names, tensors, strict=True):
                    file.seek(len(header) + places[name][0])
                    file.write(bytes_of(tensor))
            file.seek(0)
            file.write(header.replace(_NO_DIGEST.encode(), digest.hexdigest().encode()))
    except OSError as exc:
        hint = "free some space" if exc.errno == errno.ENOSPC else "choose another place"
        raise WriteError(f"Cannot write {printable_path(path)}: {exc.strerror}; {hint}.") from exc


_NO_DIGEST = "0" * 64  # in its place until it is known


def _layout(checkpoint: Checkpoint) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header with no digest yet, and where each tensor begins and ends after it."""
    entries: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "model": checkpoint.name, "digest": _NO_DIGEST}
    }
    places = {}
    start = 0
    for group in linear_groups(checkpoint.config):
        features, width = group.shape
        shapes = (("I8", [features, width], features * width), ("F32", [features], features * 4))
        for name, (dtype, shape, length) in zip(group.integer_names, shapes, strict=True):
            places[name] = (start, start + length)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": places[name]}
            start += length
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places
