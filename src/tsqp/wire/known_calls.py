"""What a worker remembers of posted calls, because the same few are posted again and again.

A call that is repeated to the last byte names the same operation, shapes and places. Those were
checked against the weights and the segment, and neither changes in a session that has a mailbox. So
the call is neither decoded nor checked again. Only calls whose check does not depend on what a
session keeps are remembered.
"""

from collections.abc import Sequence

from torch import Tensor

from tsqp.wire.messages import Call, Embed, Linear, Product

MAX_CALLS = 1024  # of one session; a model has fewer, and its tensors few places
REPEATED = (Linear, Embed, Product)

Tensors = tuple[Sequence[Tensor], Sequence[Tensor]]  # inputs and outputs


class KnownCalls:
    """The remembered calls of one session. A client that makes up new ones replaces the old."""

    def __init__(self) -> None:
        self._calls: dict[bytes, Call] = {}
        self._tensors: dict[Call, Tensors] = {}

    def call(self, body: bytes) -> Call | None:
        """The call that is encoded as `body`."""
        return self._calls.get(body)

    def tensors(self, call: Call) -> Tensors | None:
        """The tensors of a call that was checked."""
        return self._tensors.get(call)

    def remember(self, body: bytes, call: Call) -> None:
        """Keep how a call is encoded, if it may be repeated."""
        if isinstance(call.operation, REPEATED):
            if len(self._calls) >= MAX_CALLS:
                self._calls.clear()
            self._calls[body] = call

    def remember_tensors(self, call: Call, tensors: Tensors) -> None:
        """Keep the tensors of a call that was checked, if it may be repeated."""
        if isinstance(call.operation, REPEATED):
            if len(self._tensors) >= MAX_CALLS:
                self._tensors.clear()
            self._tensors[call] = tensors
