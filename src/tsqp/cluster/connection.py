"""Connects to a Ray cluster that is running."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tsqp.errors import ClusterError, UsageError

CONNECT_S = 5.0
AUTO = "auto"
_ADDRESS = re.compile(r"(?P<host>[^][:/\s]+|\[[^][/\s]+\]):(?P<port>[0-9]{1,5})\Z")
_TOKENS = (
    "set RAY_AUTH_MODE=token for every `ray start`, and give each side the same token: "
    "`ray get-auth-token --generate` writes one to ~/.ray/auth_token"
)
NO_TOKENS = f"Ray asks for no token, so everybody who reaches it can run programs there; {_TOKENS}."


@contextmanager
def connected(address: str, namespace: str) -> Iterator[None]:
    """Be a client of the Ray cluster at `address` until the block ends.

    Args:
        address: HOST:PORT of its head node, or "auto" for RAY_ADDRESS or the cluster of this node.

    Raises:
        UsageError: Ray is not installed, or is to be used without tokens.
        ClusterError: no cluster answers, or it has another token.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() != "token":  # before Ray is imported
        raise UsageError(f"RAY_AUTH_MODE is set, but not to token; {_TOKENS}.")
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS", AUTO)
    if address != AUTO:
        _check_reachable(address)
    try:
        import ray
        from ray.exceptions import AuthenticationError
    except ImportError as exc:
        raise UsageError("Ray is not installed; run `pip install 'tsqp[ray]'`.") from exc
    try:
        ray.init(address, namespace=namespace, log_to_driver=False, logging_level="ERROR")
    except AuthenticationError as exc:
        raise ClusterError(f"There is no token for Ray; {_TOKENS}.") from exc
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise ClusterError(
            f"Cannot join the Ray cluster ({'of this node' if address == AUTO else address}); "
            "start one with `ray start --head`, with the same Ray, Python and token as here, or "
            "correct --address."
        ) from exc
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for more than a minute, and fills the screen meanwhile."""
    match = _ADDRESS.match(address)
    if match is None or int(match["port"]) > 65535:
        raise UsageError("--address takes HOST:PORT of the head node, or auto.")
    try:
        where = (match["host"].strip("[]"), int(match["port"]))
        socket.create_connection(where, timeout=CONNECT_S).close()
    except OSError as exc:
        raise ClusterError(
            f"No Ray cluster answers at {address} ({exc.strerror or 'no answer in time'}); start "
            "one with `ray start --head`, or correct --address."
        ) from exc
