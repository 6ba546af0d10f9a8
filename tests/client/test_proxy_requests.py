"""Which requests the proxy forwards at all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from tsqp.client.fetch import Unreachable
from tsqp.client.pin import Pin, Verifier
from tsqp.client.proxy import Proxy
from tsqp.client.run_proxy import LOOPBACK

FORWARDED = 503  # there is no server behind this proxy


class NoServer:
    """A verifier of a server that cannot be reached."""

    is_verified = False

    @asynccontextmanager
    async def pin(self) -> AsyncIterator[Pin]:
        raise Unreachable("The server cannot be reached.")
        yield


def status(
    path: str = "/v1/models",
    hosts: frozenset[str] | None = LOOPBACK,
    host: str = "127.0.0.1:8001",
    **headers: str,
) -> int:
    """The status that a request gets."""
    proxy = Proxy(cast(Verifier, NoServer()), hosts=hosts)
    sent: list[dict[str, Any]] = []
    named = {"host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/models",  # what it decodes to does not count
        "raw_path": path.encode("latin-1"),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }
    asked = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked > 1:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(proxy(scope, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec_fetch_site": "same-origin", "origin": "http://127.0.0.1:8001"},
        {"sec_fetch_site": "same-site", "origin": "http://localhost:3000"},
        {"sec_fetch_site": "none"},
        {"origin": "http://[::1]:8001"},
    ],
    ids=str,
)
def test_programs_and_pages_of_this_machine_may_use_the_proxy(headers: dict[str, str]) -> None:
    assert status(**headers) == FORWARDED


@pytest.mark.parametrize(
    "headers",
    [
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "Same-Origin"},
        {"sec_fetch_site": "same-origin", "origin": "https://evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "http://evil.example@[::1"},
        {"origin": "file://"},
    ],
    ids=str,
)
def test_pages_of_other_sites_are_refused(headers: dict[str, str]) -> None:
    assert status(**headers) == 403


def test_a_proxy_for_others_serves_its_own_site_only() -> None:
    own: dict[str, Any] = {"hosts": None, "host": "proxy.example:8001"}
    assert status(**own) == FORWARDED
    assert status(**own, origin="http://proxy.example:3000") == FORWARDED
    assert status(**own, origin="http://localhost") == 403


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/a..b", "/v1/...", "/v1/responses/..x", "/v1/a%20b", "/v1/%25"]
)
def test_what_is_below_v1_is_forwarded(path: str) -> None:
    assert status(path) == FORWARDED


@pytest.mark.parametrize(
    "path",
    [
        "/v1", "/metrics", "/V1/models", "//v1/models", "/%761/models", "http://host/v1/models",
        "/v1/../metrics", "/v1/..", "/v1/a/../../metrics", "/v1/%2e%2e/metrics", "/v1/.%2E/metrics",
        "/v1/..%2fmetrics", "/v1/%252e%252e/metrics", "/v1/..\\metrics", "/v1/%2e%2e%5cmetrics",
        "/v1/%2525252525252e%2e",
    ],
)  # fmt: skip
def test_nothing_else_is_forwarded(path: str) -> None:
    assert status(path) == 404
