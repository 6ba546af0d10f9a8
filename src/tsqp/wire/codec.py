"""Encodes and decodes messages. Decoding is strict and bounded.

A message is one frame: a fixed header of 20 bytes, little-endian, then a msgpack body. The header
is the same in every protocol version, so that two versions can name each other.

    offset  bytes  field
    0       4      magic, b"TSQP"
    4       2      protocol version
    6       2      zero
    8       8      ticket: the call that this belongs to; 0 outside calls
    16      4      length of the body
"""

import struct
from typing import Generic, TypeVar

import msgspec

from tsqp.errors import HandshakeError, ProtocolError
from tsqp.wire.messages import PROTOCOL_VERSION, FromTEE, FromWorker, Message

MAGIC = b"TSQP"
HEADER = struct.Struct("<4sHHQI")
MAX_MESSAGE = 128 * 1024

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message, ticket: int = 0) -> bytes:
    """Encode a message as one frame."""
    return wrap(body_of(message), ticket)


def wrap(body: bytes, ticket: int) -> bytes:
    """The frame of an encoded message; see `body_of`."""
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, 0, ticket, len(body)) + body


def body_of(message: Message) -> bytes:
    """Encode a message without its header, for those who send it with many tickets."""
    return _encoder.encode(message)


def printable(text: str, keep: str = "") -> str:
    """Replace control characters and characters that cannot be encoded.

    The result has the same length. The characters in `keep` stay.
    """
    return "".join(c if c.isprintable() or c in keep else _substitute(c) for c in text)


def _substitute(character: str) -> str:
    return " " if character.isspace() else "\ufffd"


class Decoder(Generic[M]):
    """Decodes the messages that one side may receive, and no others."""

    def __init__(self, messages: object, sender: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(messages)
        self._sender = sender

    def decode(self, frame: bytes | memoryview) -> tuple[int, M]:
        """Decode `frame` into its ticket and message.

        Raises:
            ProtocolError: the frame is not exactly one valid message.
            HandshakeError: the message has another protocol version.
        """
        ticket, body = self.unwrap(frame)
        return ticket, self.read(body)

    def unwrap(self, frame: bytes | memoryview) -> tuple[int, bytes | memoryview]:
        """The ticket and the body of a frame, whose header is checked; raises as `decode` does."""
        if not HEADER.size <= len(frame) <= MAX_MESSAGE:
            raise ProtocolError(
                f"{self._sender} sent a message of {len(frame)} bytes, but "
                f"{HEADER.size} to {MAX_MESSAGE} are allowed; check what listens there."
            )
        magic, version, zero, ticket, length = HEADER.unpack_from(frame)
        if magic != MAGIC:
            raise ProtocolError(
                f"{self._sender} does not speak the TSQP protocol; check what listens there."
            )
        if version != PROTOCOL_VERSION:
            raise HandshakeError(
                f"{self._sender} speaks protocol version {version} and this side "
                f"{PROTOCOL_VERSION}; install the same tsqp version on both sides."
            )
        if zero != 0 or length != len(frame) - HEADER.size:
            raise ProtocolError(f"{self._sender} sent a message whose header is wrong.")
        return ticket, frame[HEADER.size :]

    def read(self, body: bytes | memoryview) -> M:
        """Decode the body of a frame; raises as `decode` does."""
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            reason = printable(str(exc)[:200])  # it may quote the message
            raise ProtocolError(f"{self._sender} sent an invalid message: {reason}") from exc


def tee_decoder(worker: str) -> Decoder[FromWorker]:
    """A decoder of the messages that the TEE accepts from the worker at endpoint `worker`."""
    return Decoder(FromWorker, f"The worker at {worker}")


def worker_decoder() -> Decoder[FromTEE]:
    """A decoder of the messages that a worker accepts from a client."""
    return Decoder(FromTEE, "A client")
