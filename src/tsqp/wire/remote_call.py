"""A call to a worker process."""

from collections.abc import Callable
from types import TracebackType

from torch import Tensor

from tsqp.errors import RemoteError
from tsqp.wire.call_times import CallTimes
from tsqp.wire.messages import Operation, TensorRef


class RemoteCall:
    """One call, from reservation to release. It is first the slot, then the reply."""

    def __init__(
        self,
        release: Callable[["RemoteCall"], None],
        operation: Operation,
        place: int | None,
        inputs: list[Tensor],
        outputs: list[Tensor],
        refs: tuple[TensorRef, ...],
        times: CallTimes | None,
    ) -> None:
        self.operation = operation
        self.place = place  # offset in the arena; None for inline tensors
        self.inputs = inputs
        self.outputs = outputs
        self.refs = refs
        self.times = times
        self.answered = False
        self.error: RemoteError | None = None
        self.inline_bytes = 0 if place is not None else sum(tensor.nbytes for tensor in outputs)
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
