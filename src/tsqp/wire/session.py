"""What a worker keeps of one client's session."""

from dataclasses import dataclass, field

from tsqp.errors import ProtocolError
from tsqp.wire.channel import ServiceSession
from tsqp.wire.known_calls import KnownCalls
from tsqp.wire.mailbox import MAILBOX_BYTES, Mailbox
from tsqp.wire.messages import Attach, Hello
from tsqp.wire.offers import OfferedSegment


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

    def attach(self, message: Attach) -> None:
        """Record whether the client could map the segment."""
        if self.segment is not None:
            self.segment.withdraw()
            if message.poll and self.mailbox is None:
                self.mailbox = Mailbox(self.segment.memory(MAILBOX_BYTES), "worker")
        if not message.mapped:
            self.drop_segment()

    def note(self, ticket: int, posted: bool) -> None:
        """Record a ticket; refuse one that is not greater than the last one on its path."""
        if ticket <= (self.last_posted if posted else self.last_sent):
            raise ProtocolError("A client sent the same call twice.")
        if posted:
            self.last_posted = ticket
        else:
            self.last_sent = ticket

    def close(self) -> None:
        self.service.close()
        self.drop_segment()

    def drop_segment(self) -> None:
        self.mailbox = None
        self.known = KnownCalls()
        if self.segment is not None:
            self.segment.close()
            self.segment = None
