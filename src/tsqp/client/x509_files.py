"""Certificates and lists of revoked ones, from files and from a platform's table."""

import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning

from tsqp.errors import AttestationError

MAX_ENTRIES = 8  # of a table
_ENTRY = struct.Struct("<16sII")  # GUID, offset, length


@dataclass(frozen=True)
class Material:
    """What was given to verify a report with."""

    certificates: list[x509.Certificate] = field(default_factory=list)
    crls: list[x509.CertificateRevocationList] = field(default_factory=list)

    def add(self, data: bytes, what: str) -> None:
        """Add a certificate or a list in DER, or some of either in PEM.

        Args:
            what: names the data in errors, at the beginning of a sentence.

        Raises:
            AttestationError: it is neither.
        """
        try:
            if b"-----BEGIN" in data:
                self._add_pem(data)
            else:
                self._add_der(data)
        except (ValueError, TypeError):
            raise AttestationError(
                f"{what} is neither a certificate nor a list of revoked ones, in PEM or DER."
            ) from None

    def add_table(self, table: bytes) -> None:
        """Add the certificates of a table as in the GHCB specification (AMD publication 56421).

        The table's names of certificates are not used: what each is shows by itself. Lists of
        revoked certificates are left out, because the host gives the table and would choose an old
        one.

        Raises:
            AttestationError: the table is malformed, or holds something else.
        """
        for place in range(0, min(len(table), MAX_ENTRIES * _ENTRY.size), _ENTRY.size):
            entry = table[place : place + _ENTRY.size]
            if not any(entry):
                return
            _, offset, length = _ENTRY.unpack(entry.ljust(_ENTRY.size, b"\0"))
            if not length or offset + length > len(table):
                break
            given = Material()
            given.add(table[offset : offset + length], "An entry of the platform's certificates")
            self.certificates.extend(given.certificates)
        if table:
            raise AttestationError("The table of the platform's certificates is malformed.")

    def _add_der(self, data: bytes) -> None:
        try:
            self.certificates.append(load_certificates(data)[0])
        except ValueError:
            self.crls.append(x509.load_der_x509_crl(data))

    def _add_pem(self, data: bytes) -> None:
        if b"-----BEGIN X509 CRL" in data:
            self.crls.append(x509.load_pem_x509_crl(data))
        if b"-----BEGIN CERTIFICATE" in data:
            self.certificates.extend(load_certificates(data))


def load_certificates(data: bytes) -> Sequence[x509.Certificate]:
    """The certificates in PEM, or the one in DER. Raises ValueError if it is neither."""
    with warnings.catch_warnings():
        # AMD gives VCEKs the serial number 0, and cryptography warns of it.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        try:
            if b"-----BEGIN" in data:
                return x509.load_pem_x509_certificates(data)
            return [x509.load_der_x509_certificate(data)]
        except x509.InvalidVersion:
            raise ValueError("a certificate has an unknown version") from None
