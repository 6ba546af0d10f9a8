"""What the TEE remembers of calls, because the same few are made again and again.

The sizes of a call's tensors, their views in the segment and the encoded message depend only on the
operation, the shapes and the place. They hold no contents of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tsqp.wire.channel import kind_of
from tsqp.wire.codec import body_of
from tsqp.wire.known_calls import MAX_CALLS, REPEATED
from tsqp.wire.messages import INLINE, Call, Operation, TensorRef
from tsqp.wire.shm import ALIGNMENT, Segment
from tsqp.wire.tensors import Spec


@dataclass(frozen=True, slots=True)
class PlacedForm:
    """A call at one place of the segment.

    Attributes:
        refs: of all tensors, inputs first.
        body: the encoded message.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    refs: tuple[TensorRef, ...]
    body: bytes


class CallForm:
    """All calls of one operation with tensors of certain shapes.

    Attributes:
        kind: of the operation.
        room: bytes that the tensors take in the segment.
        sent_bytes, received_bytes: bytes of the tensors.
    """

    __slots__ = ("_places", "inputs", "kind", "operation", "outputs", "received_bytes", "room",
                 "sent_bytes")  # fmt: skip

    def __init__(
        self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> None:
        self.operation = operation
        self.inputs, self.outputs = inputs, outputs
        self.kind = kind_of(operation)
        self.room = sum(map(_room, (*inputs, *outputs)))
        self.sent_bytes = sum(spec.nbytes for spec in inputs)
        self.received_bytes = sum(spec.nbytes for spec in outputs)
        self._places: dict[int, PlacedForm] = {}

    def refs(self, place: int | None) -> tuple[TensorRef, ...]:
        """References to all tensors, one behind the other from `place` on, or inline."""
        refs = []
        offset = INLINE if place is None else place
        for spec in (*self.inputs, *self.outputs):
            refs.append(spec.at(offset))
            if place is not None:
                offset += _room(spec)
        return tuple(refs)

    def body(self, refs: tuple[TensorRef, ...]) -> bytes:
        """The encoded message of a call with these references."""
        split = len(self.inputs)
        return body_of(Call(self.operation, refs[:split], refs[split:]))

    def at(self, place: int, segment: Segment) -> PlacedForm:
        """The call at byte `place` of the segment; always the same segment."""
        placed = self._places.get(place)
        if placed is None:
            refs = self.refs(place)
            specs = (*self.inputs, *self.outputs)
            tensors = tuple(
                segment.tensor(ref.offset, *spec) for ref, spec in zip(refs, specs, strict=True)
            )
            split = len(self.inputs)
            placed = PlacedForm(tensors[:split], tensors[split:], refs, self.body(refs))
            if isinstance(self.operation, REPEATED):
                if len(self._places) >= MAX_CALLS:
                    self._places.clear()
                self._places[place] = placed
        return placed

    def forget(self) -> None:
        """Let go of the segment, which is mapped as long as there are views of it."""
        self._places.clear()


class CallForms:
    """The forms of one session's calls. Operations with other contents each time are not kept."""

    def __init__(self) -> None:
        self._forms: dict[object, CallForm] = {}

    def find(
        self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> CallForm:
        """The form of a call."""
        key = operation, *inputs, None, *outputs
        form = self._forms.get(key)
        if form is None:
            form = CallForm(operation, tuple(inputs), tuple(outputs))
            if isinstance(operation, REPEATED):
                if len(self._forms) >= MAX_CALLS:
                    self._forms.clear()
                self._forms[key] = form
        return form

    def forget(self) -> None:
        """Let go of the segment, also where somebody still holds a call."""
        for form in self._forms.values():
            form.forget()
        self._forms.clear()


def _room(spec: Spec) -> int:
    return -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
