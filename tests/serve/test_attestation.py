"""Evidence under load, with slow and failing platforms, and the renewal of certificates."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from tsqp.api.claims import Claims
from tsqp.errors import AttestationError
from tsqp.serve import attestation
from tsqp.serve.attestation import MAX_QUOTES, Attestation
from tsqp.serve.errors import APIError
from tsqp.tee.attest import tls_key
from tsqp.tee.attest.provider import Quote

DEADLINE_S = 30.0
NONCE = bytes(32)


class FakeProvider:
    """A platform that answers when told to.

    Attributes:
        go: quotes wait for it.
        made: how many were begun; `at_once` of them at the same time.
    """

    platform = "sgx"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.made = self.at_once = self.running = 0
        self.error: AttestationError | None = None

    def quote(self, report_data: bytes) -> Quote:
        self.made += 1
        self.running += 1
        self.at_once = max(self.at_once, self.running)
        assert self.go.wait(DEADLINE_S)
        self.running -= 1
        if self.error is not None:
            raise self.error
        return Quote("sgx", report_data)


@asynccontextmanager
async def begun(
    provider: FakeProvider, validity: timedelta = attestation.VALIDITY
) -> AsyncIterator[Attestation]:
    made = Attestation(provider, {"a": 1}, ["localhost"], validity)
    try:
        await made.begin(model_digest=f"sha256:{'0' * 64}", privacy="tee", field=None, version="1")
        yield made
    finally:
        provider.go.set()
        made.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def refusal(made: Attestation) -> str | None:
    with pytest.raises(APIError) as caught:
        async with asyncio.timeout(DEADLINE_S / 2):
            await made.evidence(NONCE)
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers
    return caught.value.body.error.code


def test_before_the_model_is_loaded_there_is_no_evidence() -> None:
    async def run() -> None:
        provider = FakeProvider()
        made = Attestation(provider, {}, ["localhost"])
        assert await refusal(made) == "loading"
        assert provider.made == 0
        made.close()

    asyncio.run(run())


def test_quotes_are_made_one_at_a_time_and_few_may_wait() -> None:
    async def run() -> None:
        provider = FakeProvider()
        async with begun(provider) as made:
            provider.go.clear()
            nonces = [bytes([n]) * 32 for n in range(MAX_QUOTES)]
            asking = [asyncio.create_task(made.evidence(nonce)) for nonce in nonces]
            await until(lambda: provider.running == 1)
            assert await refusal(made) == "attestation_busy"
            provider.go.set()
            found = await asyncio.gather(*asking)
            assert [Claims.decode(each.claims).nonce for each in found] == nonces
            assert provider.at_once == 1
            assert (await made.evidence(NONCE)).platform == "sgx"

    asyncio.run(run())


def test_a_client_that_hangs_up_frees_its_place_but_not_the_platform() -> None:
    async def run() -> None:
        provider = FakeProvider()
        async with begun(provider) as made:
            provider.go.clear()
            asking = [asyncio.create_task(made.evidence(NONCE)) for _ in range(MAX_QUOTES)]
            await until(lambda: provider.running == 1)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            later = asyncio.create_task(made.evidence(NONCE))
            await asyncio.sleep(0.05)
            assert provider.made == 2  # the certificate's, and the one that still runs
            provider.go.set()
            await later
            assert (provider.made, provider.at_once) == (3, 1)

    asyncio.run(run())


def test_a_platform_that_hangs_is_an_error_and_nothing_piles_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        provider = FakeProvider()
        async with begun(provider) as made:
            monkeypatch.setattr(attestation, "QUOTE_S", 0.05)
            provider.go.clear()
            for _ in range(3):
                assert await refusal(made) == "attestation_busy"
            assert provider.made == 2  # later ones never reached the platform

    asyncio.run(run())


def test_a_server_whose_platform_hangs_at_the_start_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        provider = FakeProvider()
        monkeypatch.setattr(attestation, "QUOTE_S", 0.05)
        provider.go.clear()
        with pytest.raises(AttestationError, match="gave no evidence within"):
            async with begun(provider):
                pass
        provider.go.set()

    asyncio.run(run())


def test_an_error_of_the_platform_reaches_who_asked_and_the_next_one_succeeds() -> None:
    async def run() -> None:
        provider = FakeProvider()
        async with begun(provider) as made:
            provider.error = AttestationError("The platform fails.")
            with pytest.raises(AttestationError):
                await made.evidence(NONCE)
            provider.error = None
            await made.evidence(NONCE)

    asyncio.run(run())


def test_a_certificate_is_renewed_before_it_ends_and_after_failures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        provider = FakeProvider()
        async with begun(provider, timedelta(seconds=0.1)) as made:
            first = tls_key._presented(made.context)
            renewing = asyncio.create_task(made.keep_renewed())
            await until(lambda: tls_key._presented(made.context) != first)
            provider.error = AttestationError("The platform fails.")
            await until(lambda: "was not renewed" in caplog.text)
            second = tls_key._presented(made.context)
            provider.error = None
            await until(lambda: tls_key._presented(made.context) != second)
            renewing.cancel()

    asyncio.run(run())
