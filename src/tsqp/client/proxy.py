"""A proxy on this machine: any client of OpenAI's interface then talks to a verified server only.

Every request waits until the server's evidence meets the policy, and travels on a connection to the
key in that evidence. If either fails, the client gets an error and nothing of its request is sent.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote, urlsplit

import anyio
import httpx2
from starlette.types import Receive, Scope, Send

from tsqp.client.attested_tls import KeyChanged
from tsqp.client.fetch import Unreachable
from tsqp.client.pin import Pin, Verifier
from tsqp.errors import TSQPError

log = logging.getLogger("tsqp")

MAX_BODY = 64 * 2**20  # bytes
RETRY_S = "1"
# Of one connection, so that they are not passed on.
_HOP_BY_HOP = {
    b"connection", b"expect", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_SET_ANEW = {b"host", b"content-length"}
# What browsers say of requests that no page of another site makes (the header Sec-Fetch-Site).
_OWN_SITE = (b"same-origin", b"same-site", b"none")
_MAX_ENCODINGS = 4

_Headers = list[tuple[bytes, bytes]]


class ProxyError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Gone(Exception):
    """The client hung up."""


class Proxy:
    """An ASGI application that forwards everything under /v1.

    `/health` has status 200 while a verification holds, and 503 otherwise.

    Args:
        verifier: gives the connections.
        api_key: sent to the server in place of what clients send; None passes theirs on.
        hosts: names that clients may use for the proxy; None allows any. A page in a browser could
            otherwise reach a proxy on the user's machine under a name of its own.
    """

    def __init__(
        self, verifier: Verifier, api_key: str | None = None, hosts: frozenset[str] | None = None
    ) -> None:
        self._verifier = verifier
        self._api_key = api_key
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        exchange = _Exchange(scope, receive, send)
        try:
            self._check_host(exchange)
            self._check_site(exchange)
            if scope["path"] == "/health":
                await exchange.answer(200 if self._verifier.is_verified else 503, {})
            elif is_below_v1(exchange.target.partition(b"?")[0]):
                await self._forward(exchange)
            else:
                raise ProxyError(404, "not_found", "The proxy forwards only what is under /v1.")
        except _Gone:
            return
        except ProxyError as exc:
            await exchange.refuse(exc)

    def _check_host(self, exchange: "_Exchange") -> None:
        if self._hosts is None:
            return
        name = dict(exchange.headers).get(b"host", b"").decode("latin-1")
        if name.rpartition(":")[0] not in self._hosts and name not in self._hosts:
            raise ProxyError(421, "wrong_host", "Use the proxy by the address it listens on.")

    def _check_site(self, exchange: "_Exchange") -> None:
        """Refuse pages of other sites: a browser sends their requests, and some need no leave."""
        own = self._hosts
        if own is None:
            host = dict(exchange.headers).get(b"host", b"").decode("latin-1")
            own = frozenset({_host_of(f"//{host}")} - {""})
        for name, value in exchange.headers:
            if (name == b"sec-fetch-site" and value not in _OWN_SITE) or (
                name == b"origin" and _host_of(value.decode("latin-1")) not in own
            ):
                raise ProxyError(
                    403, "other_site", "The proxy does not serve pages of other sites."
                )

    async def _forward(self, exchange: "_Exchange") -> None:
        body = await exchange.read_body()
        error: ProxyError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.watch, tasks.cancel_scope)
            try:
                error = await self._try(exchange, body)
            finally:
                tasks.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _try(self, exchange: "_Exchange", body: bytes) -> ProxyError | None:
        """Send a request, once more if the server has a new key that is verified."""
        try:
            for _ in range(2):
                async with self._verifier.pin() as pin:
                    try:
                        await self._send(exchange, body, pin)
                        return None
                    except KeyChanged as exc:  # nothing was sent
                        changed = exc
                        await self._verifier.expire(pin)
            raise changed
        except Unreachable as exc:
            return ProxyError(503, "server_unavailable", str(exc))
        except TSQPError as exc:
            return ProxyError(502, "attestation_failed", str(exc))
        except httpx2.HTTPError as exc:
            log.warning("a request failed: %s", type(exc).__name__)
            if exchange.has_begun:
                raise  # the client must see that the answer is incomplete
            if isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout):
                return ProxyError(503, "server_unavailable", "The server cannot be reached.")
            return ProxyError(502, "server_failed", "The server did not answer completely.")

    async def _send(self, exchange: "_Exchange", body: bytes, pin: Pin) -> None:
        headers = self._headers(exchange.headers)
        response = await pin.send(exchange.method, exchange.target, headers, body)
        try:
            await exchange.begin(response.status_code, end_to_end(response.headers.raw))
            async for part in response.aiter_raw():
                await exchange.send(part)
            await exchange.end()
        finally:
            with anyio.CancelScope(shield=True):  # a client that hung up must free its place
                await response.aclose()

    def _headers(self, headers: _Headers) -> _Headers:
        kept = [each for each in end_to_end(headers) if each[0].lower() not in _SET_ANEW]
        if self._api_key is not None:
            kept = [each for each in kept if each[0].lower() != b"authorization"]
            kept.append((b"authorization", b"Bearer " + self._api_key.encode()))
        return kept


def is_below_v1(path: bytes) -> bool:
    """Whether a path is below /v1, whichever of its characters the server decodes."""
    if not path.startswith(b"/v1/"):
        return False
    text = path.decode("latin-1")
    for _ in range(_MAX_ENCODINGS):
        if ".." in re.split(r"[/\\]", text):
            return False
        decoded = unquote(text, "latin-1")
        if decoded == text:
            return True
        text = decoded
    return False


def _host_of(url: str) -> str:
    """The host of a URL, an address of IPv6 in brackets; empty if there is none."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return ""
    return f"[{host}]" if ":" in host else host


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> _Headers:
    """The headers that a proxy passes on: not those of one connection, nor those that it names."""
    found = [(name.lower(), value) for name, value in headers]
    named = {
        each.strip().lower()
        for name, value in found
        if name == b"connection"
        for each in value.split(b",")
    }
    return [(name, value) for name, value in found if name not in _HOP_BY_HOP | named]


class _Exchange:
    """One request of a client, and the answer to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.headers: _Headers = list(scope["headers"])
        query: bytes = scope["query_string"]
        self.target: bytes = scope["raw_path"] + (b"?" + query if query else b"")
        self.has_begun = False
        self._receive = receive
        self._send = send

    async def read_body(self) -> bytes:
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise ProxyError(413, "too_large", "The body of the request is too large.")
            more = message.get("more_body", False)
        return b"".join(parts)

    async def watch(self, scope: anyio.CancelScope) -> None:
        """End the exchange when the client hangs up, so that the server sees it too."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def begin(self, status: int, headers: _Headers) -> None:
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def answer(self, status: int, value: Mapping[str, object]) -> None:
        body = json.dumps(value).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if status == 503:
            headers.append((b"retry-after", RETRY_S.encode()))
        await self.begin(status, headers)
        await self.send(body)
        await self.end()

    async def refuse(self, error: ProxyError) -> None:
        """Answer with an error in OpenAI's form."""
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        details = {"message": str(error), "type": kind, "param": None, "code": error.code}
        await self.answer(error.status, {"error": details})
