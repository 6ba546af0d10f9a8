"""Keys and values that a worker keeps for this session (docs/decisions/0007)."""

import time

from tsqp.errors import OutOfMemory, RemoteError
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Allocate, Free, Operation, Truncate


class RemoteKv:
    """The KV of this session's sequences, by their ids.

    Args:
        timeout: seconds that the worker may take for one call.
    """

    def __init__(self, channel: Channel, timeout: float) -> None:
        self._channel = channel
        self._timeout = timeout
        self._rooms: dict[int, int] = {}

    def capacity(self, sequence: int) -> int:
        """The number of tokens for which a sequence has room."""
        return self._rooms[sequence]

    def alloc(self, sequence: int, capacity: int) -> None:
        """Make room for `capacity` tokens under a new id.

        Raises:
            OutOfMemory: the worker has none.
        """
        try:
            self._ask(Allocate(sequence, capacity))
        except RemoteError as exc:
            if exc.out_of_memory:
                raise OutOfMemory(str(exc)) from exc
            raise
        self._rooms[sequence] = capacity

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._ask(Truncate(sequence, length))

    def free(self, sequence: int) -> None:
        """Give back a sequence's memory, without waiting for the worker."""
        self._rooms.pop(sequence, None)
        self._channel.cancel(self._submit(Free(sequence)))

    def _submit(self, operation: Operation) -> int:
        return self._channel.submit(self._channel.reserve(operation, [], []))

    def _ask(self, operation: Operation) -> None:
        ticket = self._submit(operation)
        try:
            with self._channel.wait(ticket, time.monotonic() + self._timeout):
                pass
        except BaseException:  # Ctrl-C too
            self._channel.cancel(ticket)
            raise
