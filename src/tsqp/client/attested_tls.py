"""TLS whose peer is known by its key, which evidence names, and not by a certificate authority.

The check is a part of the handshake: a connection of such a context does not exist for the HTTP
library before its key was compared, so no byte of a request can be sent on another one. This holds
for each new connection of a pool. Sessions are not resumed, because Python's ssl resumes only what
`session=` names, and 0-RTT data is not offered; TLS 1.3 has no renegotiation that could change the
key of a connection in use.
"""

import hashlib
import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tsqp.errors import AttestationError, UsageError, printable_path


class KeyChanged(AttestationError):
    """A connection has another key than the verified one; nothing was sent on it."""


def pinned_context(public_key: bytes, cacert: Path | None = None) -> ssl.SSLContext:
    """A context for connections to the peer that has this key, and to no other.

    Args:
        public_key: SHA-256 of the key's SubjectPublicKeyInfo in DER.
        cacert: see `tls_context`.
    """

    def check(found: bytes) -> None:
        if found != public_key:
            raise KeyChanged(
                "The server's TLS key is not the verified one: the server was restarted, or "
                "another machine answers for it. Nothing was sent."
            )

    return tls_context(check, cacert)


def tls_context(
    check: Callable[[bytes], None] | None = None, cacert: Path | None = None
) -> ssl.SSLContext:
    """A context that compares keys and, if asked to, certificates too.

    Args:
        check: called at the end of each handshake with SHA-256 of the peer's key; it raises an
            error to refuse the connection.
        cacert: PEM file of certificate authorities, one of which must have signed the certificate
            for the name of the server. None accepts any certificate: the evidence takes its place.

    Raises:
        UsageError: the file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if cacert is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        try:
            context.load_verify_locations(cacert)
        except (OSError, ssl.SSLError):
            raise UsageError(
                f"{printable_path(cacert)} cannot be used as --cacert: name a PEM file of "
                "certificates."
            ) from None
    if check is not None:
        context.sslobject_class = _checking_object(check)
        context.sslsocket_class = _checking_socket(check)
    return context


def peer_key(connection: ssl.SSLObject | ssl.SSLSocket) -> bytes:
    """SHA-256 of the key of a connection's peer, a SubjectPublicKeyInfo in DER.

    Raises:
        AttestationError: the peer has no certificate, or one that cannot be read.
    """
    certificate = connection.getpeercert(binary_form=True)
    if certificate is None:
        raise AttestationError("The server has no TLS certificate.")
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except ValueError:
        raise AttestationError("The server's TLS certificate cannot be read.") from None
    return hashlib.sha256(der).digest()


def _checking_object(check: Callable[[bytes], None]) -> type[ssl.SSLObject]:
    class Checking(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()  # raises until the handshake is complete
            check(peer_key(self))

    return Checking


def _checking_socket(check: Callable[[bytes], None]) -> type[ssl.SSLSocket]:
    class Checking(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            try:
                check(peer_key(self))
            except BaseException:
                self.close()  # nobody else holds it yet
                raise

    return Checking
