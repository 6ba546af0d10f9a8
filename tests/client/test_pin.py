"""How long a verification holds."""

import asyncio
import time
from collections.abc import Callable

import httpx2
import pytest
from fake_platform import NOW, FakePlatform

from tsqp.client.pin import Verifier
from tsqp.client.verdict import Check, Verdict
from tsqp.client.verified import Examined


class Clock:
    """A machine that sleeps: `CLOCK_BOOTTIME` goes on, `CLOCK_MONOTONIC` does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slept = 0.0
        real = time.clock_gettime
        monkeypatch.setattr(
            time,
            "clock_gettime",
            lambda clock: real(clock) + self.slept * (clock == time.CLOCK_BOOTTIME),
        )


def verifications(platform: FakePlatform, look: Callable[[], None], use: Callable[[], None]) -> int:
    """How often a server is asked for evidence by two requests.

    Args:
        look: what happens while it is asked.
        use: what happens between the requests.
    """
    asked = 0
    verdict = Verdict(platform="sev-snp", at=NOW, checks=(Check("platform", "pass", ""),))

    async def found() -> Examined:
        nonlocal asked
        asked += 1
        look()
        return Examined(httpx2.URL("https://host"), b"k" * 32, platform.evidence(), verdict)

    async def ask() -> None:
        verifier = Verifier(found, None, reverify_s=300.0)
        async with verifier.pin():
            use()
        async with verifier.pin():
            pass
        await verifier.close()

    asyncio.run(ask())
    return asked


@pytest.mark.parametrize(("slept", "expected"), [(200.0, 1), (400.0, 2)])
def test_time_in_which_the_machine_sleeps_counts(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch, slept: float, expected: int
) -> None:
    clock = Clock(monkeypatch)

    def sleep() -> None:
        clock.slept += slept

    assert verifications(platform, lambda: None, sleep) == expected


def test_a_verification_is_as_old_as_the_question_for_evidence(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def sleep() -> None:
        clock.slept += 200.0

    assert verifications(platform, sleep, sleep) == 2
