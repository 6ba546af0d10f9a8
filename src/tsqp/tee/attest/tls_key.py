"""The key of attested TLS. It is made in this process, and never leaves it."""

import hashlib
import ipaddress
import os
import secrets
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)

from tsqp.api.evidence import EXTENSION_OID
from tsqp.errors import AttestationError

EVIDENCE = x509.ObjectIdentifier(EXTENSION_OID)
CLOCKS_DIFFER = timedelta(minutes=5)


class TlsKey:
    """An ECDSA key on P-256, and the certificates that it signs for itself.

    Attributes:
        public_key: the SubjectPublicKeyInfo in DER.
    """

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        self.public_key = self._key.public_key().public_bytes(*form)

    @property
    def digest(self) -> bytes:
        """SHA-256 of `public_key`, as claims have it."""
        return hashlib.sha256(self.public_key).digest()

    def sign(self, data: bytes) -> bytes:
        """An ECDSA signature with SHA-256, in DER."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    def certificate(
        self, hosts: Sequence[str], validity: timedelta, evidence: bytes | None = None
    ) -> x509.Certificate:
        """A new certificate.

        Args:
            hosts: names and addresses of the server, for clients that compare them.
            validity: how long it is valid from now.
            evidence: the value of the evidence extension, or None for a certificate without it.
        """
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tsqp")])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCKS_DIFFER)
            .not_valid_after(now + validity)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(map(_name, hosts)), critical=False)
        )
        if evidence is not None:
            extension = x509.UnrecognizedExtension(EVIDENCE, evidence)
            made = made.add_extension(extension, critical=False)
        return made.sign(self._key, hashes.SHA256())

    def use(self, context: ssl.SSLContext, certificate: x509.Certificate) -> None:
        """Let a TLS context present a certificate of this key to connections from now on.

        `ssl` loads keys from files only. So the key is written, encrypted under a password that is
        used once, to memory that has no name in any file system; where there is none (Gramine),
        to a file that is removed at once. A handshake in memory then shows that the context has
        this key, and not one that somebody put into that file.

        Raises:
            AttestationError: the context does not have the key.
        """
        password = secrets.token_bytes(32).hex().encode()
        form = Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password)
        pem = certificate.public_bytes(Encoding.PEM) + self._key.private_bytes(*form)
        try:
            with _unnamed_file(pem) as path:
                context.load_cert_chain(path, password=password)
        except (OSError, ssl.SSLError) as error:
            raise AttestationError(
                f"The key of TLS cannot be handed over ({type(error).__name__}): let this process "
                "create memory files, or give it a temporary folder that it may write to."
            ) from None
        if _presented(context) != certificate.public_bytes(Encoding.DER):
            raise AttestationError("TLS has another certificate than ours: its file was changed.")


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@contextmanager
def _unnamed_file(content: bytes) -> Iterator[Path]:
    """A path with this content, which is gone afterwards."""
    memory = _memory(content)
    if memory is None:
        with tempfile.NamedTemporaryFile(prefix="tsqp-") as file:  # of mode 0600
            file.write(content)
            file.flush()
            yield Path(file.name)
        return
    try:
        yield _path(memory)
    finally:
        os.close(memory)


def _memory(content: bytes) -> int | None:
    """A memory file; None where there are none, or where their paths cannot be opened."""
    try:
        memory = os.memfd_create("tls", os.MFD_CLOEXEC)
    except (OSError, AttributeError):
        return None
    with suppress(OSError):
        os.write(memory, content)
        if _path(memory).read_bytes() == content:
            return memory
    os.close(memory)
    return None


def _path(file: int) -> Path:
    return Path(f"/proc/self/fd/{file}")


def _presented(context: ssl.SSLContext) -> bytes | None:
    """The certificate that a context presents, after a handshake that proves its key; in DER."""
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = asking.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert(binary_form=True)
