"""Attested TLS: the server's key and certificate, and evidence on request."""

import asyncio
import logging
import os
import secrets
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import Evidence, configuration_digest
from tsqp.errors import AttestationError
from tsqp.runtime.options import Options
from tsqp.serve.configuration import effective_configuration
from tsqp.serve.errors import unavailable
from tsqp.serve.options import ServeOptions
from tsqp.tee.attest.choose import choose_provider
from tsqp.tee.attest.provider import REPORT_DATA_BYTES, Provider
from tsqp.tee.attest.simulated import Simulated
from tsqp.tee.attest.tls_key import TlsKey

log = logging.getLogger("tsqp")

VALIDITY = timedelta(hours=24)
RETRY_S = 60.0
QUOTE_S = 60.0
MAX_QUOTES = 8  # that wait or are being made; a platform makes one at a time
SIMULATED_WARNING = (
    "The evidence of this server is SIMULATED: it proves nothing, and nothing is protected from "
    "whoever runs the machine."
)


class Attestation:
    """The identity of one server process: its key, and what its platform says of it.

    Args:
        provider: the platform.
        configuration: see `effective_configuration`.
        hosts: names and addresses for the certificate.
        validity: of a certificate. It is renewed after half of that.

    Attributes:
        key: of TLS; it also signs receipts.
        context: of TLS. Its certificate has no evidence before `begin`.
    """

    def __init__(
        self,
        provider: Provider,
        configuration: Mapping[str, Any],
        hosts: Sequence[str],
        validity: timedelta = VALIDITY,
    ) -> None:
        self.configuration = dict(configuration)
        self.key = TlsKey()
        self.context = _tls_context()
        self._provider = provider
        self._hosts = tuple(hosts)
        self._validity = validity
        self._claims: Claims | None = None
        self._platform = ""
        self._asked = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tsqp-evidence")
        self.key.use(self.context, self.key.certificate(self._hosts, validity))

    @property
    def claims(self) -> Claims | None:
        """What evidence claims, without a nonce; None before `begin`."""
        return self._claims

    @property
    def platform(self) -> str:
        """See `Evidence.platform`; empty before `begin`."""
        return self._platform

    @property
    def warning(self) -> str | None:
        """What everybody must know who sees the evidence; None if there is no such thing."""
        return SIMULATED_WARNING if isinstance(self._provider, Simulated) else None

    async def begin(
        self, *, model_digest: str, privacy: str, field: str | None, version: str
    ) -> None:
        """Claim what was loaded, and present a certificate with evidence from now on.

        Raises:
            AttestationError: the platform gives no evidence.
        """
        claims = Claims(
            public_key=self.key.digest,
            nonce=b"",
            model_digest=model_digest,
            privacy=privacy,
            field=field,
            version=version,
            configuration=configuration_digest(self.configuration),
        )
        try:
            await self._present(claims)
        except TimeoutError:
            raise AttestationError(
                f"The platform gave no evidence within {QUOTE_S:g} seconds."
            ) from None
        self._claims = claims

    async def keep_renewed(self) -> None:
        """Renew the certificate until cancelled. A failure is logged, and tried again."""
        assert self._claims is not None
        pause = self._validity.total_seconds() / 2
        while True:
            await asyncio.sleep(pause)
            try:
                await self._present(self._claims)
                pause = self._validity.total_seconds() / 2
            except (AttestationError, TimeoutError) as error:
                log.error("The certificate was not renewed: %s", error or "the platform hangs")
                pause = min(RETRY_S, pause)

    async def evidence(self, nonce: bytes) -> Evidence:
        """Fresh evidence over a nonce of the verifier.

        Raises:
            APIError: the model is still being loaded, or too many ask.
            AttestationError: the platform gives no evidence.
        """
        if self._claims is None:
            raise unavailable("The model is still being loaded.", "loading")
        if self._asked >= MAX_QUOTES:
            raise unavailable("Too many clients ask for evidence.", "attestation_busy")
        try:
            return await self._in_turn(replace(self._claims, nonce=nonce))
        except TimeoutError:
            raise unavailable("The platform takes too long.", "attestation_busy") from None

    def close(self) -> None:
        """Make no more evidence."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _present(self, claims: Claims) -> None:
        evidence = await self._in_turn(claims)
        extension = evidence.to_extension()
        certificate = self.key.certificate(self._hosts, self._validity, extension)
        # In this thread, so that no handshake sees half of a change.
        self.key.use(self.context, certificate)
        self._platform = evidence.platform

    async def _in_turn(self, claims: Claims) -> Evidence:
        """Make one quote at a time. The turn of one that hangs in the platform does not end."""
        loop = asyncio.get_running_loop()

        def end_turn(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._turn.release)

        self._asked += 1
        try:
            async with asyncio.timeout(QUOTE_S):
                await self._turn.acquire()
                future = self._thread.submit(self._quote, claims)
                future.add_done_callback(end_turn)
                return await asyncio.shield(asyncio.wrap_future(future))
        finally:
            self._asked -= 1

    def _quote(self, claims: Claims) -> Evidence:
        encoded = claims.encode()
        quote = self._provider.quote(report_data(encoded))
        return Evidence(
            platform=quote.platform,
            quote=quote.quote,
            claims=encoded,
            certificates=quote.certificates,
            configuration=self.configuration,
        )


def begin_attestation(options: Options, served: ServeOptions) -> Attestation | None:
    """The attestation that the options ask for, after the platform has shown that it can attest.

    Raises:
        AttestationError: the platform gives no evidence.
        UsageError: the configuration is too long.
    """
    if served.attest is None:
        return None
    provider = choose_provider(served.attest)
    provider.quote(secrets.token_bytes(REPORT_DATA_BYTES))  # fails now, not after the model loads
    hosts = {"localhost", "127.0.0.1", "::1"}
    if served.host.isascii() and served.host not in ("", "0.0.0.0", "::"):
        hosts.add(served.host)
    configuration = effective_configuration(options, served, os.environ)
    attestation = Attestation(provider, configuration, sorted(hosts))
    if attestation.warning is not None:
        log.warning("%s", attestation.warning)
    return attestation


def _tls_context() -> ssl.SSLContext:
    """TLS 1.3 only, where the key signs nothing but handshakes. No connection is resumed, so each
    one proves the key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    return context
