"""The key of attested TLS."""

import os
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from tsqp.errors import AttestationError
from tsqp.tee.attest import tls_key
from tsqp.tee.attest.tls_key import TlsKey

HOUR = timedelta(hours=1)


def no_memory_files(*_: object) -> int:
    raise OSError(38, "not implemented")


def test_each_key_is_another_one() -> None:
    assert TlsKey().public_key != TlsKey().public_key


def test_a_certificate_holds_the_key_and_the_evidence_for_a_short_time() -> None:
    key = TlsKey()
    certificate = key.certificate(["localhost", "127.0.0.1"], HOUR, b"evidence")
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki == key.public_key
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    extension = certificate.extensions.get_extension_for_oid(
        x509.ObjectIdentifier("2.23.133.5.4.9")
    )
    assert extension.value.public_bytes() == b"evidence"
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now < certificate.not_valid_after_utc
    assert certificate.not_valid_after_utc - now <= HOUR
    certificate.verify_directly_issued_by(certificate)


def test_the_key_signs() -> None:
    key = TlsKey()
    public = load_der_public_key(key.public_key)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(key.sign(b"data"), b"data", ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("in_memory", [True, False])
def test_no_file_ever_holds_the_key_in_clear(
    in_memory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, bytes]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not in_memory:
        monkeypatch.setattr(os, "memfd_create", no_memory_files)

    class Watched(ssl.SSLContext):
        def load_cert_chain(self, certfile, keyfile=None, password=None) -> None:  # type: ignore[no-untyped-def,override]
            seen.append((str(certfile), Path(certfile).read_bytes()))
            super().load_cert_chain(certfile, keyfile, password)

    key = TlsKey()
    key.use(Watched(ssl.PROTOCOL_TLS_SERVER), key.certificate(["localhost"], HOUR))
    [(path, content)] = seen
    assert path.startswith("/proc/self/fd/" if in_memory else str(tmp_path))
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in content
    assert b"BEGIN PRIVATE KEY" not in content
    assert list(tmp_path.iterdir()) == []
    if in_memory:
        assert not Path(path).exists() or b"PRIVATE" not in Path(path).read_bytes()


def test_a_certificate_that_somebody_put_into_the_file_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = TlsKey()
    forged = tmp_path / "forged.pem"
    monkeypatch.setattr(tls_key, "_memory", lambda content: None)
    real = tls_key._unnamed_file

    def swap(content: bytes):  # type: ignore[no-untyped-def]
        # The host's own key in clear, in the place of ours: `ssl` would load it.
        from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

        pem = other.certificate(["localhost"], HOUR).public_bytes(Encoding.PEM)
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        forged.write_bytes(pem + other._key.private_bytes(*form))
        return real(forged.read_bytes())

    monkeypatch.setattr(tls_key, "_unnamed_file", swap)
    key = TlsKey()
    with pytest.raises(AttestationError, match="its file was changed"):
        key.use(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), key.certificate(["localhost"], HOUR))


def test_a_context_presents_a_renewed_certificate_to_new_connections() -> None:
    key, context = TlsKey(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for evidence in (None, b"one", b"two"):
        certificate = key.certificate(["localhost"], HOUR, evidence)
        key.use(context, certificate)
        assert tls_key._presented(context) == certificate.public_bytes(Encoding.DER)


def test_where_nothing_can_be_written_the_error_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "memfd_create", no_memory_files)
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    key = TlsKey()
    with pytest.raises(AttestationError, match="cannot be handed over"):
        key.use(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), key.certificate(["localhost"], HOUR))
