"""Secrets for TEEs: a real broker, a real TEE command on the simulated platform, and liars."""

import base64
import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from protocol_helpers import Commands

from key_brokers import SECRET, SIMULATED, start_broker
from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import Evidence
from tsqp.api.key_release import NO_MODEL, SUITE, ReleaseRequest, binding
from tsqp.client import clock, nonces
from tsqp.client.key_broker import Broker
from tsqp.client.nonces import Nonces
from tsqp.client.run_broker import read_secrets
from tsqp.errors import AttestationError, UsageError
from tsqp.tee.attest.simulated import Simulated
from tsqp.tee.attest.tls_key import TlsKey

REAL = 'platforms = ["sgx"]\nany_measurement = true\n'


def test_a_tee_gets_the_secret(commands: Commands, tmp_path: Path) -> None:
    url, key = start_broker(commands, tmp_path, SIMULATED)
    out = tmp_path / "out"
    flags = ["--broker-key", key, "--attest", "simulated"]
    result = commands.run("keys", "fetch", url, "weights", "--out", out, *flags)
    assert (result.status, result.stdout) == (0, ""), result
    assert out.read_bytes() == SECRET
    assert out.stat().st_mode & 0o777 == 0o600
    again = commands.run("keys", "fetch", url, "weights", "--out", out, *flags)
    assert again.status == 2  # nothing is overwritten
    absent = tmp_path / "absent"
    assert "refuses" in commands.fails("keys", "fetch", url, "other", "--out", absent, *flags)
    assert not absent.exists()


def test_a_policy_can_demand_where_the_secret_is_written(
    commands: Commands, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    policy = f'{SIMULATED}[configuration.options]\nout = "{allowed}"\n'
    url, key = start_broker(commands, tmp_path, policy)
    flags = ["--broker-key", key, "--attest", "simulated"]
    other = tmp_path / "other"
    assert "refuses" in commands.fails("keys", "fetch", url, "weights", "--out", other, *flags)
    assert commands.run("keys", "fetch", url, "weights", "--out", allowed, *flags).status == 0


def test_evidence_that_proves_nothing_gets_nothing(commands: Commands, tmp_path: Path) -> None:
    url, key = start_broker(commands, tmp_path, REAL)
    out = tmp_path / "out"
    flags = ["--out", out, "--broker-key", key]
    error = commands.fails("keys", "fetch", url, "weights", *flags, "--attest", "simulated")
    assert "refuses" in error
    assert "gives no evidence" in commands.fails("keys", "fetch", url, "weights", *flags)
    assert not out.exists()


def test_a_tee_takes_no_secret_of_another_broker(commands: Commands, tmp_path: Path) -> None:
    url, _ = start_broker(commands, tmp_path, SIMULATED)
    out = tmp_path / "out"
    error = commands.fails(
        "keys", "fetch", url, "weights", "--out", out, "--broker-key", "0" * 64,
        "--attest", "simulated",
    )  # fmt: skip
    assert "not that of --broker-key" in error
    assert not out.exists()


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    policy = tmp_path / "policy.toml"
    policy.write_text(SIMULATED)
    return Broker(policy=policy, collateral=(), secrets={"weights": SECRET})


def ask(nonce: bytes, key: X25519PrivateKey | None = None, name: str = "weights") -> ReleaseRequest:
    """An honest request."""
    key = key or X25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return ReleaseRequest(name=name, public_key=public, evidence=attest(public, nonce))


def attest(public: bytes, nonce: bytes) -> Evidence:
    claims = Claims(
        public_key=hashlib.sha256(public).digest(), nonce=nonce, model_digest=NO_MODEL,
        privacy="tee", field=None, version="1", configuration=bytes(32),
    ).encode()  # fmt: skip
    quote = Simulated().quote(report_data(claims))
    return Evidence(
        platform=quote.platform, quote=quote.quote, claims=claims, certificates=quote.certificates
    )


def test_only_the_attested_key_decrypts_the_secret_and_only_as_this_one(broker: Broker) -> None:
    key, nonce = X25519PrivateKey.generate(), bytes(32)
    request = ask(nonce, key)
    ciphertext = broker.release(request, nonce)
    info = binding("weights", request.evidence.claims)
    assert SUITE.decrypt(ciphertext, key, info=info) == SECRET
    for wrong_key, wrong_info in (
        (X25519PrivateKey.generate(), info),
        (key, binding("other", request.evidence.claims)),
        (key, binding("weights", b"")),
    ):
        with pytest.raises((InvalidTag, ValueError)):
            SUITE.decrypt(ciphertext, wrong_key, info=wrong_info)


def test_a_key_that_is_not_in_the_evidence_gets_nothing(broker: Broker) -> None:
    nonce = bytes(32)
    stolen = dataclasses.replace(ask(nonce), public_key=ask(nonce).public_key)
    with pytest.raises(AttestationError, match="not verified"):
        broker.release(stolen, nonce)


def test_the_tls_key_of_an_attested_server_gets_nothing(broker: Broker) -> None:
    # Its evidence is public, and over a nonce of whoever asks.
    nonce, public = bytes(32), TlsKey().public_key
    request = ReleaseRequest(name="weights", public_key=public, evidence=attest(public, nonce))
    with pytest.raises(AttestationError, match="not an X25519 key"):
        broker.release(request, nonce)


def test_evidence_over_another_nonce_gets_nothing(broker: Broker) -> None:
    with pytest.raises(AttestationError, match="not verified"):
        broker.release(ask(bytes(32)), b"\1" * 32)


def test_a_nonce_is_good_once_and_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, now = Nonces(), clock.seconds()
    nonce, late = broker.new(), broker.new()
    broker.take(nonce)
    flipped = bytes([nonce[0] ^ 1]) + nonce[1:]  # another time
    for wrong in (nonce, flipped, bytes(32), b"", nonce[:-1], nonce + b"\0", Nonces().new()):
        with pytest.raises(AttestationError):
            broker.take(wrong)
    monkeypatch.setattr(clock, "seconds", lambda: now + nonces.NONCE_S + 1)
    with pytest.raises(AttestationError, match="older than"):
        broker.take(late)


def test_a_flood_of_questions_displaces_no_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Nonces()
    first = broker.new()
    for _ in range(5000):
        broker.new()
    broker.take(first)
    monkeypatch.setattr(nonces, "MAX_USED", 1)
    with pytest.raises(AttestationError, match="Too many"):
        broker.take(broker.new())
    with pytest.raises(AttestationError, match="used before"):
        broker.take(first)


def test_a_request_survives_its_form_and_others_are_refused() -> None:
    request = ask(bytes(32))
    assert ReleaseRequest.from_json(request.to_json()) == request
    good = json.loads(request.to_json())
    for wrong in (
        b"", b"[]", b"{", b"1", b"[" * 10_000, b"x" * 200_000,
        *(json.dumps(good | change).encode() for change in (
            {"name": "../a"}, {"name": 1}, {"name": ""}, {"key": "?"}, {"key": None}, {"more": 1},
            {"evidence": ""}, {"evidence": base64.b64encode(b"{}").decode()},
        )),
    ):  # fmt: skip
        with pytest.raises(AttestationError):
            ReleaseRequest.from_json(wrong)


@pytest.mark.parametrize("given", [(), ("a",), ("a=",), ("=a",), ("a/b=c",), ("a=/absent",)])
def test_wrong_secrets_are_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        read_secrets(given)
