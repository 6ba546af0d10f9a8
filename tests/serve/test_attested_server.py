"""Attested TLS, end to end: a real server on the simulated platform."""

import hashlib
import re
import socket
import ssl
from importlib.resources import files

import pytest
from attested_server import AttestedServer, begin_attested, trusting_context
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from protocol_helpers import Commands
from serve_client import DEADLINE_S, KEY, OTHER_KEY, Server

from processes import TAG
from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import canonical_json
from tsqp.runtime.installed_code import code_digest

NONCE = bytes(range(32))
SECRET = "value-of-an-unknown-variable"


def test_the_certificate_has_evidence_of_its_own_key(attested_server: AttestedServer) -> None:
    certificate = attested_server.certificate()
    found = attested_server.extension()
    claims = Claims.decode(found.claims)
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    spki = certificate.public_key().public_bytes(*form)
    assert claims.public_key == hashlib.sha256(spki).digest()
    assert claims.nonce == b""
    assert found.quote[0x50:0x90] == report_data(found.claims)


def test_evidence_holds_the_nonce_and_says_what_runs(attested_server: AttestedServer) -> None:
    found = attested_server.evidence(NONCE)
    claims = Claims.decode(found.claims)
    assert claims.nonce == NONCE
    assert found.quote[0x50:0x90] == report_data(found.claims)
    status = attested_server.ask("/v1/tsqp/status").json
    assert (claims.model_digest, claims.privacy, claims.field, claims.version) == (
        status["model_digest"], "tee", None, status["version"],
    )  # fmt: skip
    assert claims.public_key == Claims.decode(attested_server.extension().claims).public_key


def test_evidence_is_fresh_for_each_nonce(attested_server: AttestedServer) -> None:
    nonces = [NONCE, NONCE[::-1], NONCE[:16], NONCE * 2]
    found = [attested_server.evidence(nonce) for nonce in nonces]
    assert [Claims.decode(each.claims).nonce for each in found] == nonces
    assert len({each.quote for each in found}) == len(nonces)


def test_the_configuration_is_served_and_has_the_claimed_hash(
    attested_server: AttestedServer,
) -> None:
    found = attested_server.evidence(NONCE)
    assert found.configuration is not None
    digest = hashlib.sha256(canonical_json(found.configuration)).digest()
    assert digest == Claims.decode(found.claims).configuration
    assert digest.hex() in attested_server.log()
    assert found.configuration["options"]["privacy"] == "tee"
    assert found.configuration["server"]["receipts"] is True
    assert found.configuration["code"]["sha256"] == code_digest(files("tsqp"))


@pytest.mark.parametrize(
    "query", ["", "?nonce=", "?nonce=00", f"?nonce={'0' * 31}", f"?nonce={'g' * 64}",
              f"?nonce={'00' * 65}", f"?nonce={'00' * 16}0", f"?other={'00' * 32}"],
)  # fmt: skip
def test_a_wrong_nonce_is_refused(attested_server: AttestedServer, query: str) -> None:
    reply = attested_server.ask(f"/.well-known/tsqp-attestation{query}")
    assert (reply.status, reply.error["param"]) == (400, "nonce")


def test_only_the_evidence_needs_no_key(attested_server: AttestedServer) -> None:
    assert attested_server.ask("/v1/models", headers={"Authorization": ""}).status == 401


def test_the_simulated_platform_says_so_everywhere(attested_server: AttestedServer) -> None:
    status = attested_server.ask("/v1/tsqp/status").json
    assert status["attestation"] == "simulated"
    assert "proves nothing" in status["attestation_warning"]
    assert "SIMULATED" in attested_server.log().split("listening at")[0]
    assert attested_server.evidence(NONCE).platform == "simulated"
    assert b"NOT A TEE" in attested_server.evidence(NONCE).certificates


def test_tls_is_new_enough_and_never_resumed(attested_server: AttestedServer) -> None:
    old = trusting_context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    address = "127.0.0.1", attested_server.port
    with socket.create_connection(address, DEADLINE_S) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw)
    with (
        socket.create_connection(address, DEADLINE_S) as raw,
        trusting_context().wrap_socket(raw) as tls,
    ):
        tls.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert tls.recv(100).startswith(b"HTTP/1.1 200")
        assert tls.session is None or not tls.session.has_ticket


def test_another_start_has_another_key_and_another_option_another_configuration(
    attested_server: AttestedServer, commands: Commands, model: object
) -> None:
    other = begin_attested(
        commands, model, "--privacy", "tee", "--served-model-name", "tiny", "--receipts",
        "--attest", "simulated", "--max-num-seqs", 3,
    )  # fmt: skip
    first, second = attested_server.claims(), other.claims()
    assert first.public_key != second.public_key
    assert first.configuration != second.configuration
    assert first.model_digest == second.model_digest
    one, two = (each.evidence(NONCE).configuration for each in (attested_server, other))
    assert one is not None and two is not None
    assert two["server"].pop("max_num_seqs") == 3
    assert one["server"].pop("max_num_seqs") == 64
    for each in (one, two):
        del each["environment"][TAG]
    assert one == two


def test_secrets_are_not_in_the_configuration(commands: Commands, model: object) -> None:
    running = commands.start(
        "serve", model, "--attest", "simulated", "--privacy", "tee", "--port", 0, "--threads", 1,
        env={"TSQP_API_KEY": f"{KEY} {OTHER_KEY}", "MY_VARIABLE": SECRET, "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    running.says("attested by ")
    found = re.search(r"listening at https://127\.0\.0\.1:(\d+)", running.stderr)
    assert found is not None
    configuration = AttestedServer(int(found[1])).evidence(NONCE).configuration
    assert configuration is not None
    assert configuration["server"]["api_keys"] == 2
    assert configuration["environment"]["MALLOC_ARENA_MAX"] == "2"
    text = canonical_json(configuration).decode()
    for secret in (KEY, OTHER_KEY, SECRET, "MY_VARIABLE", str(model)):
        assert secret not in text


def test_a_server_without_attestation_says_so(server: Server) -> None:
    reply = server.ask(f"/.well-known/tsqp-attestation?nonce={NONCE.hex()}")
    assert reply.status == 404
    assert "runs without --attest" in reply.error["message"]
    status = server.ask("/v1/tsqp/status").json
    assert (status["attestation"], status["attestation_warning"]) == (None, None)


@pytest.mark.parametrize("order", [("--attest", "MODEL"), ("MODEL", "--attest", "auto")])
def test_without_a_platform_the_server_does_not_start(
    commands: Commands, model: object, order: tuple[str, ...]
) -> None:
    error = commands.fails("serve", *(model if each == "MODEL" else each for each in order),
                           "--privacy", "tee", "--port", 0)  # fmt: skip
    assert "This platform gives no evidence" in error
    assert "/dev/attestation" in error and "/sys/kernel/config/tsm/report" in error
