"""Reads the recordings of `tsqp worker --record`. Every file is untrusted until checked.

Shape suffixes: N rows; D input features of a group.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.safetensors_file import SafetensorsFile
from tsqp.checkpoint.weights import check_memory
from tsqp.errors import CheckpointError, RecordingError, printable_path
from tsqp.gpu.record import INDEX, TENSOR, RecordedCall
from tsqp.model.config import ModelConfig, layer_groups, linear_groups, output_projection
from tsqp.model.linear_group import LinearGroup
from tsqp.wire.messages import place_of

MAX_INDEX_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Recorded:
    """The rows of one call."""

    group: LinearGroup
    rows: int


@dataclass(frozen=True, slots=True)
class Recording:
    """The inputs of the linear layers in one session, in order.

    Attributes:
        name: name to show.
        field: field of the residues, or None if the rows are activations.
        first: the first group; in prefill, its input is the normalised embeddings of the prompt.
        last: the last group; it is first called when the whole prompt is processed.
    """

    name: str
    field: Field | None
    first: LinearGroup
    last: LinearGroup
    calls: Sequence[Recorded]
    read: Callable[[int], Tensor]  # the rows of calls[i]: residues, or float32

    @property
    def mode(self) -> str:
        """The kind of values in the rows. Only recordings of the same kind can be compared."""
        return "activations" if self.field is None else f"{self.field.name} residues"

    @property
    def prompt_tokens(self) -> int:
        """Rows of the first prompt, which ends at the first call of the output projection.

        Raises:
            RecordingError: the recording ends before that.
        """
        groups = [call.group for call in self.calls]
        if self.last not in groups:
            raise RecordingError(f"{self.name} holds no complete prompt; record an answer to one.")
        before = self.calls[: groups.index(self.last)]
        return sum(call.rows for call in before if call.group == self.first)

    def groups(self) -> list[LinearGroup]:
        """All groups, in order of first appearance."""
        return list(dict.fromkeys(call.group for call in self.calls))

    def rows(self, group: LinearGroup) -> Tensor:
        """All rows that one group received, [N, D].

        Raises:
            RecordingError: a file is missing, damaged, or does not fit the model.
        """
        return torch.cat([self.read(i) for i, call in enumerate(self.calls) if call.group == group])

    def numbers(self, group: LinearGroup) -> Tensor:
        """The same as float32. Centred residues are real values, up to a scale for each row."""
        rows_ND = self.rows(group)
        return rows_ND if self.field is None else centred(rows_ND, self.field)


def centred(residues: Tensor, field: Field) -> Tensor:
    """Residues as float32 numbers in [-p/2, p/2]."""
    return torch.where(residues > field.half, residues - field.p, residues).float()


def open_recording(folder: Path, config: ModelConfig, model: str) -> Recording:
    """Open the recording of one session.

    Args:
        folder: the folder of one session, or the --record folder if it holds only one session.
        config: config of the served model.
        model: name of the model, for messages.

    Raises:
        RecordingError: there is no recording or more than one, it is damaged, or it belongs to
            another model.
    """
    session = session_folder(folder)
    everything = _read_index(session / INDEX)
    if any(call.operation == "layer" for call in everything):
        raise RecordingError(
            f"{session} holds calls of whole layers, which the worker reads completely and no "
            "attack uses; record without --fuse layer."
        )
    calls = [call for call in everything if call.group is not None]
    if not calls:
        raise RecordingError(f"{session} holds no call of a linear layer; record an answer.")
    fields = {call.field for call in calls}
    if len(fields) > 1:
        raise RecordingError(
            f"{session} mixes privacy modes or fields, so it is not the recording of one session."
        )
    known = {place_of(group): group for group in linear_groups(config)}
    recorded = []
    values: Counter[LinearGroup] = Counter()
    for call in calls:
        group = known.get((call.layer or 0, call.group or ""))
        if group is None:
            raise _other_model(session, model)
        recorded.append(Recorded(group, call.rows))
        values[group] += call.rows * group.width
    check_memory(32 * max(values.values()), f"A group of {session}")
    field_name = fields.pop()

    def read(number: int) -> Tensor:
        shape = recorded[number].rows, recorded[number].group.width
        return _read_tensor(session / (calls[number].tensor or ""), shape, stored, model)

    field = None if field_name is None else FIELDS[field_name]
    stored = "" if field is None else "I32" if field.dtype == np.int32 else "I64"
    first, last = layer_groups(config, 0).qkv, output_projection(config)
    return Recording(str(folder), field, first, last, recorded, read)


def add(recordings: Sequence[Recording]) -> Recording:
    """The element-wise sum mod p of several workers' recordings of one run.

    Raises:
        RecordingError: they do not belong to one run, or hold activations.
    """
    first, *others = recordings
    for other in others:
        if first.field is None or other.mode != first.mode or other.calls != first.calls:
            raise RecordingError(
                f"{first.name} and {other.name} are not shares of one answer; name what the "
                "workers of one session recorded."
            )
    assert first.field is not None
    p = first.field.p

    def read(number: int) -> Tensor:
        parts = [recording.read(number).long() for recording in recordings]
        return torch.stack(parts).sum(0).remainder_(p).to(parts[0].dtype)

    name = " + ".join(recording.name for recording in recordings)
    return replace(first, name=name, read=read)


def session_folder(folder: Path) -> Path:
    """The folder of one session's files.

    Args:
        folder: the folder of a session, or a folder that holds exactly one session.

    Raises:
        RecordingError: there is none, or there are several.
    """
    try:
        if (folder / INDEX).is_file():
            return folder
        indices = folder.glob(f"session-*/{INDEX}")
        found = sorted(index.parent for index in indices if index.is_file())
    except OSError as exc:
        raise RecordingError(f"Cannot read {printable_path(folder)}: {exc.strerror}.") from exc
    if not found:
        raise RecordingError(
            f"{printable_path(folder, 'That folder')} holds no recording; name a folder that "
            "`tsqp worker --record` wrote."
        )
    if len(found) > 1:
        raise RecordingError(f"{folder} holds {len(found)} sessions; name one, as {found[0]}.")
    return found[0]


def _read_index(path: Path) -> list[RecordedCall]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_INDEX_BYTES + 1)
    except OSError as exc:
        raise RecordingError(f"Cannot read {path}: {exc.strerror}.") from exc
    if len(text) > MAX_INDEX_BYTES:
        raise RecordingError(f"{path} is larger than {MAX_INDEX_BYTES} bytes; record less.")
    decoder = msgspec.json.Decoder(RecordedCall)
    calls = []
    lines = text.split(b"\n")[:-1]  # a worker that was killed may leave half a line at the end
    for number, line in enumerate(lines, 1):
        try:
            call = decoder.decode(line)
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            raise RecordingError(f"Line {number} of {path} is damaged; record again.") from exc
        if call.call != number:
            raise RecordingError(f"Line {number} of {path} is not call {number}; record again.")
        calls.append(call)
    return calls


def _read_tensor(path: Path, shape: tuple[int, int], stored: str, model: str) -> Tensor:
    if not path.is_file():
        raise RecordingError(f"The recording lacks its file {path}; record again.")
    try:
        file = SafetensorsFile(BinaryFile(path))
        try:
            if file.shape(TENSOR) != shape:
                raise _other_model(path, model)
            rows_ND = file.read(TENSOR, shape, stored)
        finally:
            file.close()
    except CheckpointError as exc:
        raise RecordingError(f"{path} is damaged; record again.") from exc
    if stored:
        return rows_ND
    if not rows_ND.isfinite().all():
        raise RecordingError(f"{path} holds NaN or infinity; record again.")
    return rows_ND.float()


def _other_model(where: Path, model: str) -> RecordingError:
    return RecordingError(f"{where} was not recorded with {model}; name the model that was.")
