"""What happens to every request: an id, the key, limits of the body, one line in the log."""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import MutableMapping
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp.api.evidence import PATH as EVIDENCE_PATH
from tsqp.serve.errors import APIError, as_api_error
from tsqp.serve.options import ServeOptions, tenant_of
from tsqp.serve.page_files import PAGE_FILES

log = logging.getLogger("tsqp")

# For load balancers, which have no key, for browsers, which get the page before the key, and for
# clients that send no key before they have verified the server.
OPEN_PATHS = ("/health", EVIDENCE_PATH, *PAGE_FILES)
# Times the limit of a body: a client that is still sending would not see why it was refused.
READ_ANYWAY = 8
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PLAIN_ID = re.compile(r"(?:[a-z]{1,16}-)?[0-9a-fA-F-]{1,64}")


class Keys:
    """The API keys, compared in constant time."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [(_digest(key), tenant_of(key)) for key in keys]

    def tenant(self, authorization: str) -> str | None:
        """Whose request it is: "" where no keys are set, None where the key is wrong."""
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        given, found = _digest(key.strip()), None
        for digest, tenant in self._digests:  # all of them, wherever the right one is
            if hmac.compare_digest(digest, given):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """The outermost part of the app."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._keys = Keys(tuple(options.api_keys))
        self._max_body = options.max_body_bytes
        self._body_timeout = options.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(16)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        began, status = perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            state["tenant"] = self._admit(scope, headers)
            body = await self._body(headers, receive)
            await self._app(scope, _replay(body, receive), send_with_id)
        except _Gone:
            pass
        except Exception as error:
            if status:
                log.error("a response broke off: %s", type(error).__name__)
            else:
                await as_api_error(error).response()(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "-")  # never what the client wrote
            log.info(
                "request id=%s method=%s path=%s status=%s ms=%.0f",
                _for_log(request_id), _method(scope), route, status or "gone",
                1e3 * (perf_counter() - began),
            )  # fmt: skip

    def _admit(self, scope: Scope, headers: Headers) -> str:
        tenant = self._keys.tenant(headers.get("authorization", ""))
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if tenant is None and path not in OPEN_PATHS:
            raise APIError(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return tenant or ""

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        too_large = APIError(
            413,
            f"The body of the request is larger than {self._max_body} bytes.",
            code="request_too_large",
            headers={"Connection": "close"},
        )
        length = headers.get("content-length", "")
        most_read = READ_ANYWAY * self._max_body
        if length.isdigit() and (len(length) > 15 or int(length) > most_read):
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self._max_body:
                        parts.append(part)
                    is_last = not message.get("more_body", False)
                    if size > most_read or (is_last and size > self._max_body):
                        raise too_large
                    if is_last:
                        return b"".join(parts)
        except TimeoutError:
            raise APIError(
                408,
                f"The body of the request did not arrive within {self._body_timeout:g} seconds.",
                headers={"Connection": "close"},
            ) from None


class _Gone(Exception):
    """The client has hung up."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body once, and then what comes after it: the end of the connection."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def again() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        given, message = message, None
        return given

    return again


def _method(scope: Scope) -> str:
    method = scope["method"]
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE") else "-"


def _for_log(request_id: str) -> str:
    """The id if it is hexadecimal, as a UUID is. Others may be any text: a digest is logged."""
    if _PLAIN_ID.fullmatch(request_id):
        return request_id
    return "sha256-" + hashlib.sha256(request_id.encode()).hexdigest()[:32]
