"""A call to a worker process."""

from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor

from tsqp.errors import RemoteError
from tsqp.wire.call_forms import CallForm, PlacedForm
from tsqp.wire.call_times import CallTimes


class RemoteCall:
    """One call, from reservation to release. It is first the slot, then the reply.

    Attributes:
        form, refs, body: see `CallForm` and `PlacedForm`.
        place: offset in the arena; None for inline tensors.
        inline_bytes: bytes of the answer that come through the socket.
    """

    __slots__ = ("_release", "answered", "body", "error", "form", "inline_bytes", "inputs",
                 "outputs", "place", "refs", "times")  # fmt: skip

    def __init__(
        self,
        release: Callable[["RemoteCall"], None],
        form: CallForm,
        placed: PlacedForm,
        place: int | None,
        times: CallTimes | None,
    ) -> None:
        self.form = form
        self.place = place
        self.inputs: Sequence[Tensor] = placed.inputs
        self.outputs: Sequence[Tensor] = placed.outputs
        self.refs = placed.refs
        self.body = placed.body
        self.times = times
        self.answered = False
        self.error: RemoteError | None = None
        self.inline_bytes = 0 if place is not None else form.received_bytes
        self._release = release

    def __enter__(self) -> "RemoteCall":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release(self)
        if self.times is not None:
            self.times.end()
