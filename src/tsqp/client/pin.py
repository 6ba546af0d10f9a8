"""The verified key of a server, and when it has to be verified again."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx2

from tsqp.client import clock
from tsqp.client.attested_tls import pinned_context
from tsqp.client.fetch import CONNECT_S
from tsqp.client.verdict import SIMULATED
from tsqp.client.verified import Examined
from tsqp.errors import TSQPError

log = logging.getLogger("tsqp")

READ_S = 600.0  # without any data; a long prompt is computed before the first token
FAILED_S = 1.0  # after a failure, so that clients in a hurry do not keep the server busy


class Pin:
    """A key, and connections to it.

    Attributes:
        public_key: SHA-256 of the key.
        verified_at: when the evidence of its last verification was asked for, in seconds of
            `clock`. The evidence may be as old as that.
        users: number of requests that use it now.
        is_retired: no new request uses it.
    """

    def __init__(self, found: Examined, cacert: Path | None, verified_at: float) -> None:
        self.public_key = found.public_key
        self.verified_at = verified_at
        self.users = 0
        self.is_retired = False
        self._origin = found.origin
        # A transport without a client around it adds no headers, cookies or redirects.
        self._transport = httpx2.AsyncHTTPTransport(
            verify=pinned_context(found.public_key, cacert),
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def send(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> httpx2.Response:
        """Send a request on a connection to this key.

        Args:
            target: path and query.

        Returns:
            the answer, whose body is still to be read. It has to be closed.

        Raises:
            KeyChanged: the server has another key; nothing was sent.
            httpx2.HTTPError: the server cannot be reached, or its answer not be read.
        """
        request = httpx2.Request(
            method,
            self._origin.copy_with(raw_path=target),
            headers=headers,
            content=body,
            extensions={"timeout": httpx2.Timeout(READ_S, connect=CONNECT_S).as_dict()},
        )
        return await self._transport.handle_async_request(request)

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()


class Verifier:
    """Holds the pin, and verifies anew when it must not be used any more.

    Args:
        look: asks the server for evidence and checks it, as `examine` does. It may read the policy
            and the collateral anew, so that a user can change them.
        cacert: see `tls_context`.
        reverify_s: seconds for which a verification holds.
    """

    def __init__(
        self, look: Callable[[], Awaitable[Examined]], cacert: Path | None, reverify_s: float
    ) -> None:
        self._look = look
        self._cacert = cacert
        self._reverify_s = reverify_s
        self._lock = asyncio.Lock()
        self._pin: Pin | None = None
        self._failure: tuple[float, TSQPError] | None = None

    @property
    def is_verified(self) -> bool:
        """Whether a verification holds now."""
        return self._holds(self._pin)

    @asynccontextmanager
    async def pin(self) -> AsyncIterator[Pin]:
        """The pin, for one request. It is verified first if it has to be.

        Raises:
            TSQPError: the server cannot be reached or is not verified, or a file cannot be used.
        """
        pin = await self._current()
        pin.users += 1
        try:
            yield pin
        finally:
            pin.users -= 1
            await self._close_unused(pin)

    async def expire(self, pin: Pin) -> None:
        """Verify before the next request: the server answered with another key."""
        if self._pin is pin:
            await self._retire()

    async def close(self) -> None:
        """Close the connections that are not in use."""
        await self._retire()

    async def _current(self) -> Pin:
        if self._pin is not None and self._holds(self._pin):
            return self._pin
        async with self._lock:  # one verification for all that wait for it
            if self._pin is not None and self._holds(self._pin):
                return self._pin
            if self._failure is not None and clock.seconds() - self._failure[0] < FAILED_S:
                raise self._failure[1]
            asked_at = clock.seconds()
            try:
                found = await self._look()
                found.verdict.require()
            except TSQPError as exc:
                log.error("not verified: %s", exc)
                self._failure = (clock.seconds(), exc)
                await self._retire()
                raise
            return await self._accept(found, asked_at)

    async def _accept(self, found: Examined, asked_at: float) -> Pin:
        note = f"; {SIMULATED}" if found.evidence.platform == "simulated" else ""
        log.info(
            "verified: platform %s, TLS key %s…%s",
            found.evidence.platform, found.public_key.hex()[:16], note,
        )  # fmt: skip
        if self._pin is not None and self._pin.public_key == found.public_key:
            self._pin.verified_at = asked_at
            return self._pin
        await self._retire()
        self._pin = Pin(found, self._cacert, asked_at)
        return self._pin

    def _holds(self, pin: Pin | None) -> bool:
        return pin is not None and clock.seconds() - pin.verified_at < self._reverify_s

    async def _retire(self) -> None:
        """Use the pin for no new request. Requests that were sent may end."""
        if (pin := self._pin) is not None:
            self._pin = None
            pin.is_retired = True
            await self._close_unused(pin)

    async def _close_unused(self, pin: Pin) -> None:
        if pin.is_retired and not pin.users:
            with anyio.CancelScope(shield=True):  # also for a client that hung up
                await pin.close()
