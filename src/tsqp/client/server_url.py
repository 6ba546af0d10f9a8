"""The address of a server, and how to reach it."""

import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tsqp.errors import UsageError
from tsqp.wire.endpoint import Endpoint

CONNECT_S = 10.0
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class ServerURL:
    """The address of an OpenAI-compatible server.

    Attributes:
        base: what the paths of the interface are added to; ends in /v1.
        is_tls: whether it is an https address.
        is_exposed: whether other machines may see what is sent, in clear.
    """

    base: str
    is_tls: bool
    is_exposed: bool

    def __str__(self) -> str:
        return self.base.removesuffix("/v1")


def parse_server_url(text: str) -> ServerURL:
    """Parse `http://HOST:PORT` or `https://HOST:PORT`, with or without a path and /v1.

    Raises:
        UsageError: it is another kind of address.
    """
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    port = url.port if url.port is not None else DEFAULT_PORTS.get(url.scheme, 0)
    named = bool(url.host) and not any(character.isspace() for character in text)
    if url.scheme not in DEFAULT_PORTS or not named or not 0 < port < 65536:
        raise UsageError("--url must be the address of a server, such as http://127.0.0.1:8000.")
    if url.userinfo or url.query or url.fragment:
        raise UsageError(
            "--url must have no user name, password, query or fragment: leave out what is before "
            "an @, or behind a ? or #."
        )
    host = f"[{url.host}]" if ":" in url.host else url.host
    reached = Endpoint("tcp", f"{host}:{port}")
    is_tls = url.scheme == "https"
    base = str(url).rstrip("/").removesuffix("/v1")
    return ServerURL(f"{base}/v1", is_tls, not is_tls and not reached.is_loopback)


def open_transport(url: ServerURL, cacert: Path | None = None) -> httpx2.BaseTransport:
    """A transport that connects to the server directly, never through a proxy.

    Args:
        cacert: PEM file of the authorities to trust, instead of the system's.

    Raises:
        UsageError: `cacert` cannot be used.
    """
    if cacert is not None and not url.is_tls:
        raise UsageError("--cacert is for an https address; this one is not encrypted.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # it trusts nobody
    if url.is_tls:
        try:
            context = ssl.create_default_context(cafile=cacert)
        except (OSError, ssl.SSLError):
            raise UsageError(
                "The file of --cacert cannot be used: it must hold certificates in PEM form."
            ) from None
    # A server may close a connection that waits for the next message, as it is being sent.
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.HTTPTransport(verify=context, trust_env=False, limits=limits)
