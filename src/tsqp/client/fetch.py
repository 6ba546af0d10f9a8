"""Asks a server for evidence, on a connection whose key is known."""

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tsqp.api.evidence import MAX_JSON, PATH, Evidence
from tsqp.client.attested_tls import peer_key, tls_context
from tsqp.client.text import printable
from tsqp.errors import AttestationError, UsageError

NONCE = 32  # bytes
CONNECT_S = 10.0
TOTAL_S = 60.0  # a quote may take seconds, and others may wait for theirs


class Unreachable(AttestationError):
    """The server gave no evidence because it cannot be reached, or not now."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Evidence, and what it must agree with.

    Attributes:
        public_key: SHA-256 of the key of the connection on which the evidence came.
        nonce: what the server was asked with.
    """

    evidence: Evidence
    public_key: bytes
    nonce: bytes


def origin_of(url: str) -> httpx2.URL:
    """The part of a server's URL that names the server.

    Args:
        url: https://HOST or https://HOST:PORT, with or without /v1.

    Raises:
        UsageError: it is something else, for example plain HTTP.
    """
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError, TypeError):
        raise UsageError("The URL cannot be read: give https://HOST:PORT.") from None
    if parsed.scheme == "http":
        raise UsageError("Plain HTTP is refused, because it shows prompts: give an https:// URL.")
    is_plain = not (parsed.userinfo or parsed.query or parsed.fragment)
    is_plain = is_plain and parsed.path.rstrip("/") in ("", "/v1")
    is_address = parsed.host and (parsed.port is None or 0 < parsed.port < 65536)
    if parsed.scheme != "https" or not is_address or not is_plain:
        raise UsageError("The URL must be https://HOST:PORT, with nothing after it but /v1.")
    return httpx2.URL(scheme="https", host=parsed.host, port=parsed.port)


async def fetch_evidence(
    origin: httpx2.URL, cacert: Path | None = None, total_s: float = TOTAL_S
) -> Fetched:
    """Ask a server for evidence with a new nonce.

    Args:
        origin: see `origin_of`.
        cacert: see `tls_context`.
        total_s: seconds after which to give up.

    Raises:
        AttestationError: the server cannot be reached, redirects, is too slow, says too much, or
            gives no evidence.
    """
    nonce = secrets.token_bytes(NONCE)
    context = tls_context(cacert=cacert)
    timeout = httpx2.Timeout(total_s, connect=CONNECT_S)
    try:
        async with (
            asyncio.timeout(total_s),
            httpx2.AsyncClient(verify=context, trust_env=False, timeout=timeout) as client,
            client.stream(
                "GET",
                origin.join(PATH),
                params={"nonce": nonce.hex()},
                headers={"Accept-Encoding": "identity"},
                follow_redirects=False,
            ) as response,
        ):
            connection = response.extensions["network_stream"].get_extra_info("ssl_object")
            public_key = peer_key(connection)
            _check_status(response)
            body = await _read(response)
    except TimeoutError:
        raise Unreachable(f"The server gave no evidence within {total_s:g} seconds.") from None
    except httpx2.HTTPError as exc:
        raise Unreachable(_why(exc)) from None
    return Fetched(Evidence.from_json(body), public_key, nonce)


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    if 300 <= status < 400:
        raise AttestationError("The server redirects, which is refused: give its own URL.")
    if status == 404:
        raise AttestationError("The server gives no evidence: start it with `tsqp serve --attest`.")
    if status == 503:
        raise Unreachable("The server is loading or busy (status 503): try again later.")
    raise AttestationError(f"The server gives no evidence: it answered with status {status}.")


async def _read(response: httpx2.Response) -> bytes:
    """The body, as it came. More bytes than evidence has are not read."""
    body = b""
    async for part in response.aiter_raw():
        body += part
        if len(body) > MAX_JSON:
            raise AttestationError(f"The server's evidence has more than {MAX_JSON:,} bytes.")
    return body


def _why(error: httpx2.HTTPError) -> str:
    match error:
        case httpx2.TimeoutException():
            return "The server did not answer in time."
        case httpx2.ConnectError():
            reason = printable(str(error)).rstrip(".")
            return f"The server cannot be reached: {reason or 'no connection'}."
        case _:
            return "The server's answer cannot be read: it is cut short or not HTTP."
