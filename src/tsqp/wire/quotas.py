"""Limits on what a client may take of a worker, so that no client takes everything."""

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

from tsqp.errors import HandshakeError, WorkerUnavailable
from tsqp.wire.shm import MIN_SEGMENT

IPV6_PREFIX = 64  # the prefix that one customer or machine usually gets


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits of one worker.

    Attributes:
        max_sessions: sessions of all clients together.
        max_sessions_per_client: sessions of one user on this machine or of one address; see
            `client_name`.
        max_shm_bytes: shared memory of one session; 0 sends tensors through the socket.
        max_total_shm_bytes: shared memory of all sessions. It is always limited to half of the
            memory that would be free without them.
    """

    max_sessions: int = 64
    max_sessions_per_client: int = 16
    max_shm_bytes: int = 2**30
    max_total_shm_bytes: int | None = None

    def check_session(self, client: str, others: Collection[str]) -> None:
        """Raise HandshakeError unless `client` may open another session.

        Args:
            others: the client of each open session.
        """
        if len(others) >= self.max_sessions:
            raise HandshakeError(
                f"the worker has {len(others)} sessions already, which is its --max-sessions; "
                "try later."
            )
        own = sum(other == client for other in others)
        if own >= self.max_sessions_per_client:
            raise HandshakeError(
                f"the worker has {own} sessions with this user or address already, which is its "
                "--max-sessions-per-client; end one, or try later."
            )

    def shm_bytes(self, wanted: int, held: int, free: int) -> int:
        """Bytes of shared memory for a new session.

        Args:
            wanted: bytes that the client wants.
            held: bytes that the open sessions hold.
            free: bytes that are still free.

        Raises:
            WorkerUnavailable: the other sessions hold all of it. The session can go on without.
        """
        total = (free + held) // 2
        if self.max_total_shm_bytes is not None:
            total = min(total, self.max_total_shm_bytes)
        size = min(wanted, self.max_shm_bytes, max(0, total - held))
        if held and size < MIN_SEGMENT <= min(wanted, self.max_shm_bytes):
            raise WorkerUnavailable(
                f"no shared memory left: all sessions together may have {total} bytes, and the "
                f"others have {held}"
            )
        return size


DEFAULT_QUOTAS = Quotas()


def client_name(scheme: str, address: str) -> str:
    """The client of a connection, for limits: a user of this machine, or an address.

    Args:
        scheme: ipc or tcp.
        address: as libzmq gives it: "NAME:UID:GID:PID" for ipc, an IP address for tcp. An IPv6
            network of 64 bits counts as one client.
    """
    if scheme == "ipc":
        fields = address.split(":")
        return f"uid {fields[1]}" if len(fields) == 4 else "unknown"
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, IPV6_PREFIX), strict=False))
    return str(ip)
