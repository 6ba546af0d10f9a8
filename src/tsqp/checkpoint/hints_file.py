"""Hints of lattice masks on disk [P10]: what `tsqp prepare --hints` writes, and the cache holds.

A safetensors file: for each group the lower and the upper bits of its hints, with the public seed
and the digest of the weights in the header. It appears under its name when it is whole. Nothing in
it is secret, and nothing in it is believed: whoever uses hints checks them in private memory first.
"""

import errno
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tsqp.algebra.hints import LABEL, SEED_BYTES, Polynomials, make_hints, public_polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.residue_blocks import BLOCK
from tsqp.algebra.ring import Ring
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.new_file import new_file
from tsqp.checkpoint.prepared import PreparedFile
from tsqp.checkpoint.progress import Progress, silent
from tsqp.checkpoint.safetensors_file import SafetensorsFile
from tsqp.errors import CheckpointError, HintsError
from tsqp.model.linear_group import LinearGroup

SUFFIX = ".tsqp.hints"
_RING = {
    "format": "tsqp-hints-1",
    "label": LABEL.decode(),
    "q": str(LATTICE.p),
    "degree": str(DEGREE),
    "block": str(BLOCK),
}
_NO_DIGEST = "0" * 64  # in its place until it is known


class HintsFile:
    """A hints file that is open.

    Attributes:
        seed: of the public polynomials.
        digest: of the integer weights, as its header has it.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            HintsError: there is no such file, it is cut short, or of another version.
        """
        self._path = path
        try:
            self._file = SafetensorsFile(BinaryFile(path))
        except CheckpointError as exc:
            raise _unusable(path, exc) from exc
        metadata = self._file.metadata
        try:
            self.seed = bytes.fromhex(metadata.get("seed", ""))
        except ValueError:
            self.seed = b""
        self.digest = metadata.get("digest", "")
        is_ours = all(metadata.get(name) == value for name, value in _RING.items())
        if not is_ours or len(self.seed) != SEED_BYTES:
            self.close()
            raise HintsError(
                f"{path} does not hold hints of this version; make it again with `tsqp prepare "
                "--hints`."
            )

    def read(self, group: LinearGroup) -> Polynomials:
        """The hints of one group, in memory of their own; still to be checked.

        Raises:
            HintsError: they are not there, cut short, or of another shape.
        """
        shape = -(-group.features // BLOCK), DEGREE, BLOCK
        low_name, high_name = group.hint_names
        try:
            low = self._file.read(low_name, shape, stored="U32")
            high = self._file.read(high_name, shape, stored="U16")
        except CheckpointError as exc:
            raise _unusable(self._path, exc) from exc
        return Polynomials(low.numpy(), high.numpy(), group.features)

    def check_digest(self, digest: str) -> None:
        """Raise HintsError unless the header names these weights.

        Args:
            digest: of the integer weights.
        """
        if digest != self.digest:
            raise HintsError(
                f"{self._path} was written for other weights; make it again with `tsqp prepare "
                "--hints`."
            )

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()


def _unusable(path: Path, error: CheckpointError) -> HintsError:
    reason = str(error).removesuffix(".").removesuffix(": fetch it again")
    advice = "make it again with `tsqp prepare --hints`"
    if isinstance(error.__cause__, PermissionError):
        advice = "let this user read it"
    return HintsError(f"Cannot use the hints in {path}: {reason}; {advice}.")


class HintsWriter:
    """Writes the hints of each group in its place.

    Attributes:
        digest: of the weights; to be set before the end.
    """

    def __init__(self, file: BinaryIO, start: int, places: Mapping[str, int]) -> None:
        self._file = file
        self._start = start
        self._places = places
        self.digest = ""

    def add(self, group: LinearGroup, hints: Polynomials) -> None:
        """One group."""
        for name, part in zip(group.hint_names, (hints.low_GNB, hints.high_GNB), strict=True):
            self._file.seek(self._start + self._places[name])
            self._file.write(np.ascontiguousarray(part).data)


@contextmanager
def new_hints_file(path: Path, seed: bytes, groups: Sequence[LinearGroup]) -> Iterator[HintsWriter]:
    """Write a hints file, all at once or not at all.

    Args:
        seed: of the public polynomials.
        groups: in the order of the file; the hints of all of them must be added.

    Raises:
        HintsError: the file cannot be written, or the disk has too little room for it.
    """
    metadata = _RING | {"seed": seed.hex(), "digest": _NO_DIGEST}
    header, places, end = _layout(groups, metadata)
    size = len(header) + end
    try:
        if size > (free := shutil.disk_usage(path.parent).free):
            raise HintsError(
                f"Cannot write {path}: it takes {size} bytes, and {free} are free; free some space."
            )
        with new_file(path, SUFFIX) as file:
            file.truncate(size)
            writer = HintsWriter(file, len(header), places)
            yield writer
            assert len(writer.digest) == len(_NO_DIGEST)
            file.seek(0)
            file.write(header.replace(_NO_DIGEST.encode(), writer.digest.encode()))
    except OSError as exc:
        hint = "free some space" if exc.errno == errno.ENOSPC else "choose another place"
        raise HintsError(f"Cannot write {path}: {exc.strerror}; {hint}.") from exc


def write_hints(prepared: PreparedFile, path: Path, progress: Progress = silent) -> None:
    """Make the hints of a prepared file's weights, under a seed of their own, and write them.

    Args:
        progress: called with the bytes of weights done and their total.

    Raises:
        CheckpointError: the prepared file is damaged.
        HintsError: the file cannot be written.
    """
    seed = secrets.token_bytes(SEED_BYTES)
    groups = prepared.linear_groups()
    widest = max(group.width for group in groups)
    with new_hints_file(path, seed, groups) as writer:
        public = public_polynomials(Ring.of(LATTICE.p, DEGREE), seed, widest)
        for group, weights in prepared.groups(progress):
            writer.add(group, make_hints(public, weights.weight_FD))
        writer.digest = prepared.digest


def _layout(
    groups: Sequence[LinearGroup], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor begins after it, and where the last one ends."""
    entries: dict[str, object] = {"__metadata__": metadata}
    places: dict[str, int] = {}
    start = 0
    for group in groups:
        shape = [-(-group.features // BLOCK), DEGREE, BLOCK]
        for name, dtype, size in zip(group.hint_names, ("U32", "U16"), (4, 2), strict=True):
            end = start + size * shape[0] * shape[1] * shape[2]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            places[name], start = start, end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places, start
