"""A platform that is none: reports of SEV-SNP under a root of our own, to try things out.

The formats are the real ones. The key that signs is in this package, so anybody can make such
evidence, and it proves nothing. Verifiers refuse it unless they are told otherwise.
"""

import hashlib
import struct
from functools import cache
from importlib.resources import files

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from tsqp.tee.attest.layout import SNP_REPORT_BYTES
from tsqp.tee.attest.provider import REPORT_DATA_BYTES, Quote

WARNING = "TSQP SIMULATED PLATFORM, NOT A TEE"
MEASUREMENT = hashlib.sha384(WARNING.encode()).digest()
CHIP_ID = hashlib.sha512(WARNING.encode()).digest()
TCB = bytes((1, 0, 0, 0, 0, 0, 1, 1))  # boot loader, TEE, four reserved, SNP, microcode
SIGNED_BYTES = 0x2A0
POLICY = 0x30000  # SMT is allowed and debugging is not; bit 17 is always 1
P384_SHA384 = 1
NUMBER_BYTES = 72  # of each of the two numbers of a signature, little-endian
# The table of certificates of the GHCB specification: which they are, by RFC 4122 GUID.
ARK = bytes.fromhex("c0b406a4a803495297433fb6014cd0ae")
ASK = bytes.fromhex("4ab7b379bbac4fe4a02f05aef327c782")
VCEK = bytes.fromhex("63da758de6644564adc5f4b93be8accd")


class Simulated:
    """Reports that prove nothing."""

    platform = "simulated"

    def quote(self, report_data: bytes) -> Quote:
        """See `Provider.quote`."""
        assert len(report_data) == REPORT_DATA_BYTES
        return Quote(self.platform, _report(report_data), _table(_certificates()))


def _report(report_data: bytes) -> bytes:
    """A report of version 2, as the SEV-SNP firmware ABI has it."""
    report = bytearray(SNP_REPORT_BYTES)
    struct.pack_into("<IIQ", report, 0, 2, 0, POLICY)
    struct.pack_into("<I", report, 0x34, P384_SHA384)
    report[0x50:0x90] = report_data
    report[0x90:0xC0] = MEASUREMENT
    report[0x160:0x180] = b"\xff" * 32  # no migration agent
    report[0x1A0:0x1E0] = CHIP_ID
    for place in (0x38, 0x180, 0x1E0, 0x1F0):  # current, reported, committed and launch TCB
        report[place : place + len(TCB)] = TCB
    der = _key().sign(bytes(report[:SIGNED_BYTES]), ec.ECDSA(hashes.SHA384()))
    for place, number in enumerate(decode_dss_signature(der)):
        begin = SIGNED_BYTES + place * NUMBER_BYTES
        report[begin : begin + NUMBER_BYTES] = number.to_bytes(NUMBER_BYTES, "little")
    return bytes(report)


def _table(certificates: dict[bytes, bytes]) -> bytes:
    """Entries of GUID, offset and length; one of zeros; then the certificates in DER."""
    entry = struct.Struct("<16sII")
    offset = entry.size * (len(certificates) + 1)
    head, body = b"", b""
    for guid, der in certificates.items():
        head += entry.pack(guid, offset + len(body), len(der))
        body += der
    return head + bytes(entry.size) + body


@cache
def _pem() -> bytes:
    return (files("tsqp.tee.attest") / "simulated_platform.pem").read_bytes()


@cache
def _certificates() -> dict[bytes, bytes]:
    chain = x509.load_pem_x509_certificates(_pem())
    return {
        guid: each.public_bytes(Encoding.DER)
        for guid, each in zip((ARK, ASK, VCEK), chain, strict=True)
    }


@cache
def _key() -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(_pem()[_pem().index(b"-----BEGIN PRIVATE") :], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key
