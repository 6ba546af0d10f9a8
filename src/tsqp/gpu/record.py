"""`tsqp worker --record DIR`: everything a worker receives, written down for audits.

    DIR/session-1/calls.jsonl           one `RecordedCall` a line
    DIR/session-1/000001.safetensors    its tensors, as the worker saw them

A session holds the calls of one client, from its handshake to its end. A line is written after
its tensors, and a file gets its name only when it is complete. So if a worker is killed, every call
that has a line can be read.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from safetensors.torch import save
from torch import Tensor

from tsqp.algebra.params import FieldName
from tsqp.errors import RecordingError, UsageError, printable_path
from tsqp.gpu.worker import Worker
from tsqp.wire.channel import kind_of
from tsqp.wire.messages import (
    MAX_LAYERS,
    Allocate,
    AttentionScores,
    Embed,
    Free,
    Layer,
    Linear,
    Name,
    Operation,
    Product,
    SeedProduct,
    Truncate,
    WeightedValues,
)
from tsqp.wire.server import OnCall

INDEX = "calls.jsonl"
TENSOR = "input"  # the name of a call's one tensor in a safetensors file
TENSORS = {AttentionScores: ("q", "k", "v"), WeightedValues: ("weights",)}


class RecordedCall(Struct, frozen=True, forbid_unknown_fields=True):
    """One call.

    Attributes:
        call, session: numbers, from 1.
        layer, group: null for the embedding; -1 and "lm_head" for the output projection; the group
            is null for a call about kept keys and values, and so is the layer if it has none.
        field: null if the tensor holds activations or token ids instead of residues, which are
            int32, or int64 in the lattice field.
        rows: rows of the first tensor; for attention weights, which are flat, of the answer.
        tensor: a safetensors file next to the index; null for a call without tensors.
        sequences: the numbers about sequences in a call about keys and values, as in its message.
    """

    call: Annotated[int, Meta(ge=1)]
    session: Annotated[int, Meta(ge=1)]
    operation: Name
    layer: Annotated[int, Meta(ge=-1, lt=MAX_LAYERS)] | None
    group: Name | None
    field: FieldName | None
    rows: Annotated[int, Meta(ge=0, le=2**31)]
    tensor: Annotated[str, Meta(pattern=r"^[0-9]{1,12}\.safetensors\Z")] | None
    sequences: tuple[tuple[int, ...], ...] = ()


class Recorder:
    """Writes one recording."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, which only this user can read, or use an empty one.

        Raises:
            UsageError: the folder is not empty.
            RecordingError: it cannot be made or written.
        """
        self._folder = folder
        self._calls: dict[int, int] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UsageError(f"{folder} is not empty; record in a new folder.")
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as exc:
            raise self._failed(exc) from exc

    def of(self, worker: Worker) -> OnCall:
        """A function that records every call to `worker` before it is computed."""
        return lambda session, operation, inputs: self.note(
            session, operation, worker.received(operation, inputs)
        )

    def note(self, session: int, operation: Operation, received: Sequence[Tensor]) -> None:
        """Record one call.

        Raises:
            RecordingError: it cannot be written.
        """
        number = self._calls[session] = self._calls.get(session, 0) + 1
        layer, group, field = _place(operation)
        call = RecordedCall(
            call=number,
            session=session,
            operation=kind_of(operation),
            layer=layer,
            group=group,
            field=field,
            rows=_rows(operation, received),
            tensor=f"{number:06}.safetensors" if received else None,
            sequences=_sequences(operation),
        )
        folder = self._folder / f"session-{session}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if call.tensor is not None:
                names = TENSORS.get(type(operation), (TENSOR,))
                named = dict(zip(names, received, strict=True))
                _write(folder / call.tensor, save(named))
            with (folder / INDEX).open("ab") as index:
                index.write(msgspec.json.encode(call) + b"\n")
        except OSError as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: OSError) -> RecordingError:
        hint = "free some space" if exc.errno == errno.ENOSPC else "record in another folder"
        folder = printable_path(self._folder, "that folder")
        return RecordingError(f"Cannot record in {folder}: {exc.strerror}; {hint}.")


def _place(operation: Operation) -> tuple[int | None, str | None, FieldName | None]:
    match operation:
        case Embed() | Allocate() | Truncate() | Free():
            return None, None, None
        case AttentionScores(layer) | WeightedValues(layer) | Layer(layer):
            return layer, None, None
        case Linear(layer, group):
            return layer, group, None
        case Product(layer, group, field) | SeedProduct(layer, group, field):
            return layer, group, field


def _rows(operation: Operation, received: Sequence[Tensor]) -> int:
    if isinstance(operation, WeightedValues):
        return sum(each.rows for each in operation.weighted)
    return len(received[0]) if received else 0


def _sequences(operation: Operation) -> tuple[tuple[int, ...], ...]:
    match operation:
        case Allocate(sequence, number) | Truncate(sequence, number):
            return ((sequence, number),)
        case Free(sequence):
            return ((sequence,),)
        case AttentionScores(_, spans) | Layer(_, spans):
            return tuple((span.sequence, span.start, span.length) for span in spans)
        case WeightedValues(_, weighted):
            return tuple((each.sequence, each.rows, each.length) for each in weighted)
    return ()


def _write(path: Path, content: bytes) -> None:
    """Write a file completely, or leave no file of that name."""
    temporary = path.with_suffix(".part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
