"""Finds out why a ZeroMQ handshake failed, from the greeting of the peer.

Two libzmq peers with different security mechanisms disconnect so fast that either side may see only
a broken connection. So this module sends the beginning of a greeting (ZMTP 3, RFC 23) itself. The
peer answers with its complete greeting, which names its mechanism, and waits for the rest.
"""

import socket
import time
from typing import Literal

from tsqp.errors import HandshakeError, WorkerError, WorkerUnavailable
from tsqp.wire.endpoint import Endpoint

Mechanism = Literal["NULL", "CURVE"]

ASK_S = 1.0  # timeout for finding out why a handshake failed
_BEGINNING = b"\xff" + bytes(8) + b"\x7f" + b"\x03"  # the signature and the major version
_LENGTH = 64
_NAME = slice(12, 32)
_MECHANISMS: dict[bytes, Mechanism] = {b"NULL": "NULL", b"CURVE": "CURVE"}


def ask_mechanism(endpoint: Endpoint, timeout: float) -> Mechanism | None:
    """Ask a peer for its security mechanism; None if the peer does not speak ZMTP.

    Args:
        endpoint: ipc or tcp.
        timeout: seconds for the connection and the answer together.
    """
    deadline = time.monotonic() + timeout
    try:
        with connect(endpoint, deadline) as peer:
            peer.sendall(_BEGINNING)
            greeting = b""
            while len(greeting) < _LENGTH:
                peer.settimeout(_left(deadline))
                more = peer.recv(_LENGTH - len(greeting))
                if not more:
                    break
                greeting += more
    except OSError:
        return None
    is_greeting = len(greeting) == _LENGTH and greeting[:1] + greeting[9:10] == b"\xff\x7f"
    return _MECHANISMS.get(greeting[_NAME].rstrip(b"\0")) if is_greeting else None


def connect(endpoint: Endpoint, deadline: float) -> socket.socket:
    """Open a plain socket to an ipc or tcp endpoint.

    Args:
        deadline: a time of time.monotonic.

    Raises:
        OSError: nobody listens there.
    """
    if endpoint.scheme == "tcp":
        return socket.create_connection((endpoint.host, endpoint.port), _left(deadline))
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(_left(deadline))
        path = endpoint.address
        peer.connect("\0" + path[1:] if endpoint.is_abstract else path)
    except BaseException:
        peer.close()
        raise
    return peer


def why_not(endpoint: Endpoint, *, encrypting: bool) -> WorkerError:
    """The error that explains why the handshake with a peer failed."""
    mechanism = ask_mechanism(endpoint, ASK_S)
    if mechanism is None or (mechanism == "NULL" and not encrypting):
        return WorkerUnavailable(
            f"{endpoint} does not answer as a TSQP worker, or the worker hangs; check the endpoint."
        )
    if not encrypting:
        return HandshakeError(
            f"The worker at {endpoint} accepts only encrypted links; give its public key, "
            "which it shows when it starts, as --worker-key."
        )
    if mechanism == "NULL":
        return HandshakeError(
            f"The worker at {endpoint} does not encrypt, and a --worker-key was given for it; "
            "start it with --keyfile, or leave --worker-key out."
        )
    return HandshakeError(
        f"The worker at {endpoint} does not hold the secret key that belongs to this --worker-key; "
        "check the key, which the worker shows when it starts, and the endpoint."
    )


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
