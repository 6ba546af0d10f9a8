"""Asks a worker what it serves, without opening a session and without having the weights.

The protocol has no message for this. A worker refuses a client with other weights, and the refusal
says which weights the worker holds.
"""

import secrets
import time
from typing import NamedTuple

from tsqp.errors import HandshakeError, ProtocolError, WorkerLost
from tsqp.model.shard import Shard
from tsqp.wire.codec import encode, printable, tee_decoder
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.handshake import no_answer, read_refusal
from tsqp.wire.messages import Failure, Hello, WeightsDtype
from tsqp.wire.wakeup import NO_WAKEUP
from tsqp.wire.zmq import ClientSocket

_NOBODY_S = "0" * 64  # no model has this digest
_DTYPES: dict[str, WeightsDtype] = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
}  # fmt: skip


class Served(NamedTuple):
    """What a worker says that it holds.

    Attributes:
        dtype: of its weights.
        digest: the first 12 digits of their digest.
        shard: which part of the model they are.
    """

    dtype: WeightsDtype
    digest: str
    shard: Shard


def ask_what_is_served(
    endpoint: Endpoint, worker_key: str | None, dtype: WeightsDtype, timeout: float = 5.0
) -> Served:
    """Ask a worker which weights it holds.

    Args:
        endpoint: ipc or tcp.
        worker_key: the worker's public key, for an encrypted link.
        dtype: "int8" to ask for the weights of the private modes, any other for those of `open`.
        timeout: seconds for the connection, and again for the answer.

    Raises:
        WorkerUnavailable, WorkerLost: nobody serves the endpoint, or no answer comes in time.
        HandshakeError: the worker has another key or protocol version, or no such weights.
        ProtocolError: the worker sent an unexpected answer.
    """
    reason = _refusal(endpoint, worker_key, dtype, timeout)
    found = read_refusal(reason)
    if found.dtype is not None:
        dtype = _DTYPES[found.dtype]
        reason = _refusal(endpoint, worker_key, dtype, timeout)
        found = read_refusal(reason)
    if found.digest is None:
        raise HandshakeError(f"Refused by the worker at {endpoint}: {reason}")
    return Served(dtype, found.digest, found.shard)


def _refusal(
    endpoint: Endpoint, worker_key: str | None, dtype: WeightsDtype, timeout: float
) -> str:
    name = f"The worker at {endpoint}"
    hello = Hello(secrets.token_bytes(32), _NOBODY_S, dtype, abilities=(), shm_bytes=0)
    socket = ClientSocket(endpoint, timeout, worker_key)
    try:
        socket.send([encode(hello)])
        deadline = time.monotonic() + timeout
        try:
            while (frame := socket.receive(deadline, NO_WAKEUP)) is None:
                pass
        except WorkerLost as exc:
            raise no_answer(endpoint) from exc
        _, message = tee_decoder(str(endpoint)).decode(frame)
        socket.receive_exactly([], name)
    finally:
        socket.close()
    if not isinstance(message, Failure):
        raise ProtocolError(f"{name} answered the handshake wrongly.")
    return printable(message.message)
