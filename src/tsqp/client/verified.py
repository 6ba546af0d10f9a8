"""Connections to a server that has been verified. This is the Python interface.

policy = Policy(...)  # or read_policy(Path("policy.toml"))
with connect("https://server:8000", policy) as http:
    client = OpenAI(base_url="https://server:8000/v1", http_client=http)
"""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from tsqp.api.evidence import Evidence
from tsqp.client.attested_tls import pinned_context
from tsqp.client.collateral import Collateral, read_collateral
from tsqp.client.fetch import fetch_evidence, origin_of
from tsqp.client.policy import Policy
from tsqp.client.verdict import Verdict
from tsqp.client.verify import verify_evidence
from tsqp.errors import AttestationError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Examined:
    """A server that gave evidence.

    Attributes:
        origin: its URL without a path.
        public_key: SHA-256 of the key of the connection on which the evidence came.
        evidence: what it gave.
        verdict: whether the evidence meets the policy.
    """

    origin: httpx2.URL
    public_key: bytes
    evidence: Evidence
    verdict: Verdict


async def examine(
    url: str, policy: Policy, *, collateral: Collateral | None = None, cacert: Path | None = None
) -> Examined:
    """Ask a server for evidence and check it. Sends nothing else.

    Args:
        url: https://HOST:PORT.
        collateral: in addition to the policy's own.
        cacert: PEM file of certificate authorities, one of which must have signed the server's
            certificate; None relies on the evidence.

    Raises:
        UsageError: the URL is another than of HTTPS.
        AttestationError: the server cannot be reached or gives no evidence.
    """
    origin = origin_of(url)
    collateral = _merged(read_collateral(Path(each) for each in policy.collateral), collateral)
    fetched = await fetch_evidence(origin, cacert)
    verdict = verify_evidence(
        fetched.evidence,
        policy,
        at=datetime.now(UTC),
        collateral=collateral,
        public_key=fetched.public_key,
        nonce=fetched.nonce,
    )
    return Examined(origin, fetched.public_key, fetched.evidence, verdict)


def verify_url(
    url: str, policy: Policy, *, collateral: Collateral | None = None, cacert: Path | None = None
) -> Examined:
    """`examine`, for code that is not asynchronous."""
    return _run(examine(url, policy, collateral=collateral, cacert=cacert))


def connect(
    url: str,
    policy: Policy,
    *,
    collateral: Collateral | None = None,
    cacert: Path | None = None,
    timeout: float | None = 600.0,
) -> httpx2.Client:
    """A client for one server, after verifying it.

    Each of its connections is to the verified key, and requests to other servers are refused. It
    does not verify again: a server that restarts has another key, and is refused with
    `AttestationError` until `connect` is called anew.

    Args:
        url, policy, collateral, cacert: as for `examine`.
        timeout: seconds without any data after which a request fails.

    Raises:
        UsageError: the URL is another than of HTTPS.
        AttestationError: the server cannot be reached, or its evidence does not meet the policy.
    """
    found = verify_url(url, policy, collateral=collateral, cacert=cacert)
    found.verdict.require()
    context = pinned_context(found.public_key, cacert)
    transport = PinnedTransport(found.origin, httpx2.HTTPTransport(verify=context, trust_env=False))
    return httpx2.Client(transport=transport, trust_env=False, timeout=timeout)


class PinnedTransport(httpx2.BaseTransport):
    """Sends requests to one server only.

    Args:
        origin: the server.
        inner: a transport with a pinned context.
    """

    def __init__(self, origin: httpx2.URL, inner: httpx2.BaseTransport) -> None:
        self._origin = origin
        self._inner = inner

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request. Raises AttestationError if it is for another server."""
        check_origin(request.url, self._origin)
        return self._inner.handle_request(request)

    def close(self) -> None:
        """Close all connections."""
        self._inner.close()


def check_origin(url: httpx2.URL, origin: httpx2.URL) -> None:
    """Raise AttestationError if a URL is of another server than the verified one."""
    if _address(url) != _address(origin):
        raise AttestationError("The request is for another server than the verified one.")


def _address(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or 443


def _merged(first: Collateral, second: Collateral | None) -> Collateral:
    if second is not None:
        first.intel.extend(second.intel)
        first.amd.certificates.extend(second.amd.certificates)
        first.amd.crls.extend(second.amd.crls)
    return first


def _run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine, also if the caller's thread runs an event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
