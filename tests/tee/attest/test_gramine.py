"""Gramine's /dev/attestation, as a fake has it."""

import errno
import re
import threading
import time
from pathlib import Path

import pytest
from fake_platforms import FakeGramine, fake_intel_quote

from tsqp.errors import AttestationError
from tsqp.tee.attest.gramine import ATTEMPTS, Gramine

DEVICE = Path("/fake/attestation")
DATA = bytes(range(64))


def refusal(fake: FakeGramine) -> str:
    with pytest.raises(AttestationError) as caught:
        Gramine(DEVICE, fake).quote(DATA)
    sentence = str(caught.value)
    assert re.fullmatch(r"[A-Z][^\n]*[a-z0-9)]\.", sentence), sentence
    return sentence


def test_a_quote_holds_the_report_data() -> None:
    quote = Gramine(DEVICE, FakeGramine()).quote(DATA)
    assert (quote.platform, quote.certificates) == ("sgx", b"")
    assert quote.quote == fake_intel_quote(DATA, 3, 0)


@pytest.mark.parametrize("kind", [b"none", b"epid", b"", b"\xff" * 100])
def test_an_enclave_without_dcap_is_refused(kind: bytes) -> None:
    assert 'sgx.remote_attestation = "dcap"' in refusal(FakeGramine(kind))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EIO, errno.EINVAL])
@pytest.mark.parametrize(
    "step", [("read", "attestation_type"), ("write", "user_report_data"), ("read", "quote")]
)
def test_every_error_is_one_sentence(step: tuple[str, str], number: int) -> None:
    fake = FakeGramine()
    fake.fail(*step, number)
    assert str(DEVICE) in refusal(fake)


def test_a_quote_over_the_report_data_of_other_code_is_made_again() -> None:
    fake, times = FakeGramine(), []

    def overwrite_once() -> None:
        if not times:
            fake.held = bytes(64)
        times.append(1)

    fake.meanwhile = overwrite_once
    assert Gramine(DEVICE, fake).quote(DATA).quote == fake_intel_quote(DATA, 3, 0)
    assert len(times) == 2


def test_endless_disturbance_ends_in_an_error() -> None:
    fake, times = FakeGramine(), []

    def overwrite() -> None:
        fake.held = bytes(64)
        times.append(1)

    fake.meanwhile = overwrite
    assert "do not hold the report data" in refusal(fake)
    assert len(times) == ATTEMPTS


def test_threads_at_once_take_turns_even_with_several_providers() -> None:
    fake = FakeGramine()
    inside: list[int] = []
    most: list[int] = []

    def look() -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()

    fake.meanwhile = look
    found: dict[int, bytes] = {}

    def ask(n: int) -> None:
        found[n] = Gramine(DEVICE, fake).quote(bytes([n]) * 64).quote

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {n: fake_intel_quote(bytes([n]) * 64, 3, 0) for n in range(4)}
    assert most == [1] * 4


def test_a_truncated_quote_is_refused() -> None:
    for length in (0, 7, 40, 400, 437, 535):
        fake = FakeGramine()
        whole = fake_intel_quote(DATA, 3, 0)
        fake.read = lambda path, limit, cut=whole[:length]: (  # type: ignore[method-assign,misc]
            b"dcap" if path.name == "attestation_type" else cut
        )
        refusal(fake)
