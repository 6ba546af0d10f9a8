"""The state of one client's session with a worker's server."""

from collections import deque
from dataclasses import dataclass, field

import torch

from tsqp.errors import ProtocolError
from tsqp.wire.channel import Completion, ServiceSession, UsesMemory
from tsqp.wire.known_calls import KnownCalls, Tensors
from tsqp.wire.mailbox import MAILBOX_BYTES, Mailbox
from tsqp.wire.messages import Attach, Call, Hello
from tsqp.wire.offers import OfferedSegment


@dataclass(frozen=True, slots=True)
class Begun:
    """A call that a device computes.

    Attributes:
        held: its tensors, which must stay.
    """

    ticket: int
    call: Call
    held: Tensors
    posted: bool
    completion: Completion


@dataclass(slots=True)
class Session:
    """The state of one client's session."""

    number: int  # from 1 on
    service: ServiceSession
    client: str  # the client whose limits it counts for
    hello: Hello
    segment: OfferedSegment | None = None
    mailbox: Mailbox | None = None
    known: KnownCalls = field(default_factory=KnownCalls)
    last_sent: int = 0  # last ticket through the socket
    last_posted: int = 0  # last ticket through the mailbox; either path may be faster
    begun: deque[Begun] = field(default_factory=deque)
    uses_memory: bool = False  # whether the service was told where the segment is

    def attach(self, message: Attach) -> None:
        """Record whether the client could map the segment."""
        if self.segment is not None:
            self.segment.withdraw()
            if message.poll and self.mailbox is None:
                self.mailbox = Mailbox(self.segment.memory(MAILBOX_BYTES), "worker")
        if not message.mapped:
            self.drop_segment()
        elif (
            self.segment is not None
            and not self.uses_memory  # a client may say so again, and registering takes long
            and isinstance(self.service, UsesMemory)
        ):
            self.uses_memory = True
            self.service.use_memory(self.segment.tensor(0, (self.segment.size,), torch.uint8))

    def note(self, ticket: int, posted: bool) -> None:
        """Record a ticket; refuse one that is not greater than the last one on its path."""
        if ticket <= (self.last_posted if posted else self.last_sent):
            raise ProtocolError("A client sent the same call twice.")
        if posted:
            self.last_posted = ticket
        else:
            self.last_sent = ticket

    def oldest_is_done(self) -> bool:
        """Whether the first begun call is complete, or has failed; there must be one."""
        try:
            return self.begun[0].completion.is_done()
        except RuntimeError:
            return True  # `wait` raises it again

    def close(self) -> None:
        try:
            self.service.close()
        finally:
            self.begun.clear()
            self.drop_segment()

    def drop_segment(self) -> None:
        self.mailbox = None
        self.known = KnownCalls()
        self.uses_memory = False
        if self.segment is not None:
            try:
                if isinstance(self.service, UsesMemory):
                    self.service.forget_memory()
            finally:
                self.segment.close()
                self.segment = None
