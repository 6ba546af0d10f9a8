"""Claims against a policy: each demand is checked, and only signed claims count."""

import dataclasses
import json
from datetime import UTC, datetime

import msgspec
import pytest
from fake_platform import CONFIGURATION, DIGEST, NOW, FakePlatform
from samples import ANYTHING, failed

from tsqp.api.evidence import Evidence
from tsqp.client import amd_checks
from tsqp.client.policy import Policy
from tsqp.client.verdict import SIMULATED, Verdict
from tsqp.client.verify import verify_evidence
from tsqp.errors import AttestationError

WITHOUT_ROOT = {"root", "claims", "TLS key", "nonce"}  # nothing else counts then
KEY, NONCE = b"k" * 32, b"n" * 32


@pytest.fixture(autouse=True)
def _trust_the_platform(platform: FakePlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives import hashes

    root = platform.ark.fingerprint(hashes.SHA256()).hex()
    monkeypatch.setattr(amd_checks, "AMD_ROOTS", {root: "ours"})


def judge(
    evidence: Evidence,
    policy: Policy = ANYTHING,
    *,
    key: bytes | None = KEY,
    nonce: bytes | None = NONCE,
    at: datetime = NOW,
    **demands: object,
) -> Verdict:
    policy = msgspec.structs.replace(policy, **demands)
    return verify_evidence(evidence, policy, at=at, public_key=key, nonce=nonce)


def test_evidence_for_this_connection_and_question_is_accepted(platform: FakePlatform) -> None:
    verdict = judge(platform.evidence())
    assert verdict.accepted
    verdict.require()


def test_another_key_is_refused(platform: FakePlatform) -> None:
    assert failed(judge(platform.evidence(), key=b"K" * 32)) == {"TLS key"}


def test_another_nonce_is_refused(platform: FakePlatform) -> None:
    assert failed(judge(platform.evidence(), nonce=b"N" * 32)) == {"nonce"}
    assert failed(judge(platform.evidence(nonce=b""))) == {"nonce"}


def test_claims_that_were_not_signed_do_not_count(platform: FakePlatform) -> None:
    one, other = platform.evidence(), platform.evidence(privacy="open")
    verdict = judge(dataclasses.replace(one, claims=other.claims))
    assert {"claims", "TLS key", "nonce"} <= failed(verdict)
    assert failed(judge(dataclasses.replace(one, claims=b""))) == {"TLS key", "nonce"}


@pytest.mark.parametrize(
    ("demands", "wrong"),
    [
        ({"model_digest": (DIGEST,)}, set()),
        ({"model_digest": ("sha256:" + "00" * 32,)}, {"model digest"}),
        ({"privacy": ("shares", "pad")}, set()),
        ({"privacy": ("shares",)}, {"privacy"}),
        ({"field": ("wide",)}, set()),
        ({"field": ("lattice",)}, {"field"}),
        ({"version": ("0.1.0",)}, set()),
        ({"version": ("0.1.1",)}, {"version"}),
        ({"configuration": {"options": {"threads": 2}}}, set()),
        ({"configuration": CONFIGURATION}, set()),
        ({"configuration": {"options": {"threads": 3}}}, {"configuration.options.threads"}),
        ({"configuration": {"server": {"api_keys": True}}}, {"configuration.server.api_keys"}),
        ({"configuration": {"server": {"more": 1}}}, {"configuration.server.more"}),
        ({"configuration": {"options": 1}}, {"configuration.options"}),
    ],
)
def test_demands_on_claims_are_checked(
    platform: FakePlatform, demands: dict[str, object], wrong: set[str]
) -> None:
    assert failed(judge(platform.evidence(), **demands)) == wrong


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"model_digest": "sha256:" + "00" * 32}, {"model digest"}),
        ({"privacy": "open"}, {"privacy"}),
        ({"field": None}, {"field"}),
        ({"version": "0.2.0"}, {"version"}),
        ({"configuration": b"c" * 32}, {"configuration"}),
    ],
)
def test_a_server_that_claims_something_else_is_refused(
    platform: FakePlatform, change: dict[str, object], wrong: set[str]
) -> None:
    policy = msgspec.structs.replace(
        ANYTHING, model_digest=(DIGEST,), privacy=("pad",), field=("wide",), version=("0.1.0",)
    )
    assert failed(judge(platform.evidence(**change), policy)) == wrong  # type: ignore[arg-type]


def test_a_configuration_with_another_hash_is_refused(platform: FakePlatform) -> None:
    evidence = dataclasses.replace(platform.evidence(), configuration={"options": {}})
    assert failed(judge(evidence)) == {"configuration"}


def test_demanded_settings_need_the_configuration(platform: FakePlatform) -> None:
    evidence = dataclasses.replace(platform.evidence(), configuration=None)
    assert judge(evidence).accepted
    wanted = {"options": {"threads": 2}}
    assert failed(judge(evidence, configuration=wanted)) == {"configuration.options.threads"}


def test_the_simulated_platform_is_refused_unless_the_policy_allows_it() -> None:
    from tsqp.api.claims import Claims, report_data
    from tsqp.tee.attest.simulated import Simulated

    claims = Claims.decode(FakePlatform().evidence().claims).encode()
    made = Simulated().quote(report_data(claims))
    simulated = Evidence(
        platform="simulated", quote=made.quote, claims=claims, certificates=made.certificates
    )
    at = datetime(2026, 6, 1, tzinfo=UTC)
    assert failed(judge(simulated, at=at)) == {"platform", *WITHOUT_ROOT}
    disguised = dataclasses.replace(simulated, platform="sev-snp")
    assert failed(judge(disguised, at=at)) == WITHOUT_ROOT
    assert failed(judge(disguised, at=at, allow_simulated=True)) == WITHOUT_ROOT
    allowed = judge(simulated, at=at, allow_simulated=True)
    assert allowed.accepted
    assert SIMULATED in allowed.summary()
    assert SIMULATED in allowed.text().splitlines()[0]
    assert json.loads(allowed.json())["note"] == SIMULATED


def test_a_real_platform_is_not_taken_for_the_simulated_one(platform: FakePlatform) -> None:
    evidence = platform.evidence(platform="simulated")
    assert failed(judge(evidence, allow_simulated=True)) == WITHOUT_ROOT


def test_a_refused_verdict_names_every_reason(platform: FakePlatform) -> None:
    verdict = judge(platform.evidence(), key=b"K" * 32, privacy=("open",))
    with pytest.raises(AttestationError, match=r"TLS key: .*privacy: "):
        verdict.require()
    printed = json.loads(verdict.json())
    assert printed["accepted"] is False
    assert {c["name"] for c in printed["checks"] if c["outcome"] == "fail"} == {
        "TLS key", "privacy",
    }  # fmt: skip


def test_what_a_server_says_cannot_control_a_terminal(platform: FakePlatform) -> None:
    evidence = dataclasses.replace(
        platform.evidence(), configuration={"a": "\x1b[2J\n\u202eevil" * 1000}
    )
    wanted = {"a": "\x1b[2J"}
    text = judge(evidence, configuration=wanted).text()
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text) < 10_000


def test_errors_of_a_check_refuse_the_evidence(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(amd_checks, "verify_snp", broken)
    assert "evidence" in failed(judge(platform.evidence()))
