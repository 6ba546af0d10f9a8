"""The form of quotes and collateral of Intel, where dcap-qvl is lenient.

dcap-qvl ignores bytes after a quote, the numbers that name the kind of certification data, copies
of the root certificate, and the chain of the revocation list's issuer. None of them can make it
accept a forged quote. They are checked here all the same, so that every
byte of a quote and its collateral counts.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from tsqp.client.x509_files import load_certificates
from tsqp.errors import AttestationError

# SHA-256 of the DER of "Intel SGX Root CA".
INTEL_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
TEES = {"sgx": 0, "tdx": 0x81}

_HEADER = 48  # bytes
_BODIES = {("sgx", 3): 384, ("tdx", 4): 584}  # bytes, by platform and the quote's version
_SIGNATURE_AND_KEY = 64 + 64  # bytes
_QE_REPORT = 384 + 64  # bytes of the quoting enclave's report and its signature
_QE_CERTIFICATION, _PCK_CHAIN = 6, 5  # kinds of certification data
_CHAINS = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain")


@dataclass
class _Reader:
    """Reads forward; nothing may remain at the end."""

    data: bytes
    place: int = 0

    def take(self, length: int) -> bytes:
        part = self.data[self.place : self.place + length]
        if len(part) < length:
            raise AttestationError("the quote is cut short")
        self.place += length
        return part

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def end(self) -> None:
        if self.place != len(self.data):
            raise AttestationError("the quote has bytes that belong to nothing")


def check_form(quote: bytes, platform: str, collateral: str, root: str = INTEL_ROOT) -> None:
    """Refuse a quote or collateral in another form than Intel's software writes.

    Args:
        platform: sgx or tdx.
        collateral: JSON.
        root: SHA-256 of the root certificate, in hexadecimal digits.

    Raises:
        AttestationError: lengths or kinds contradict one another, there are bytes after the quote
            that are not zero, a chain is not in plain PEM or ends at another root, or the list of
            revoked certificates is of another issuer than the quote's.
    """
    pck = _read_chain(_pck_chain(quote, platform), root, "quote")
    fields = json.loads(collateral)
    chains = {name: _read_chain(fields[name], root, name) for name in _CHAINS}
    if chains["pck_crl_issuer_chain"][0] != pck[-2]:
        raise AttestationError("the list of revoked certificates is of another issuer")


def _pck_chain(quote: bytes, platform: str) -> str:
    """The certificates in a quote."""
    outer = _Reader(quote)
    version, _, tee = struct.unpack("<HHI", outer.take(8))
    outer.take(_HEADER - 8)
    if tee != TEES[platform]:
        raise AttestationError(f"the quote is not of {platform}")
    if version == 5:
        _, size = struct.unpack("<HI", outer.take(6))
    elif (size := _BODIES.get((platform, version), 0)) == 0:
        raise AttestationError(f"quotes of version {version} are not supported for {platform}")
    outer.take(size)
    inner = _Reader(outer.take(outer.integer(4)))
    if any(quote[outer.place :]):  # zeros may pad a quote
        raise AttestationError("there are bytes after the quote")
    inner.take(_SIGNATURE_AND_KEY)
    if version != 3:
        _certification(inner, _QE_CERTIFICATION)
    inner.take(_QE_REPORT)
    inner.take(inner.integer(2))
    chain = _certification(inner, _PCK_CHAIN)
    return chain.removesuffix(b"\0").decode("ascii", "replace")


def _certification(reader: _Reader, kind: int) -> bytes:
    """Certification data, which is the rest."""
    if reader.integer(2) != kind:
        raise AttestationError("the quote holds no chain of certificates, and is not supported")
    if reader.integer(4) != len(reader.data) - reader.place:
        raise AttestationError("the quote has bytes that belong to nothing")
    if kind == _PCK_CHAIN:
        return reader.take(len(reader.data) - reader.place)
    return b""


def _read_chain(text: object, root: str, what: str) -> Sequence[x509.Certificate]:
    """Certificates in PEM, up to the root, exactly as they are usually written."""
    try:
        chain = load_certificates(str(text).encode())
    except ValueError:
        raise AttestationError(f"the certificates of the {what} cannot be read") from None
    written = "".join(each.public_bytes(Encoding.PEM).decode() for each in chain)
    if written.strip("\n") != str(text).replace("\r\n", "\n").strip("\n"):
        raise AttestationError(f"the certificates of the {what} are not in plain PEM")
    if len(chain) < 2 or chain[-1].fingerprint(hashes.SHA256()).hex() != root:
        raise AttestationError(f"the certificates of the {what} end at another root than Intel's")
    return chain
