"""The attestation report of SEV-SNP, as AMD's firmware ABI (publication 56860) has it."""

import struct
from dataclasses import dataclass

from tsqp.errors import AttestationError

REPORT_BYTES = 1184
SIGNED = 0x2A0  # bytes that the signature covers; the signature follows
NUMBER = 72  # bytes of each of the two numbers of a signature, little-endian
VERSIONS = range(2, 6)
ECDSA_P384_SHA384 = 1
SIGNED_BY_VCEK = 0

_DEBUG, _MIGRATION_AGENT = 1 << 19, 1 << 18  # of the guest's policy
_NO_AGENT = (b"\xff" * 32, bytes(32))  # the ID of an agent's report, where there is none
_MASKED_CHIP_ID = 1 << 1  # of the flags


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security versions of the parts of a platform, as on Milan and Genoa."""

    boot_loader: int
    tee: int
    snp: int
    microcode: int

    @classmethod
    def of(cls, data: bytes) -> "Tcb":
        """Read the 8 bytes of a report. Reserved bytes must be 0."""
        boot_loader, tee, reserved, snp, microcode = struct.unpack("<BB4sBB", data)
        if any(reserved):
            raise AttestationError(
                "The report's TCB version has another layout: only Milan and Genoa are supported."
            )
        return cls(boot_loader, tee, snp, microcode)

    def __str__(self) -> str:
        return (
            f"boot loader {self.boot_loader}, TEE {self.tee}, SNP {self.snp}, "
            f"microcode {self.microcode}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpReport:
    """The fields of a report that are checked.

    Attributes:
        signed: the bytes that the signature covers.
        r, s: the signature.
        chip_id: 64 bytes.
        has_debug, has_migration_agent: what the guest's policy and the report say.
    """

    signed: bytes
    r: int
    s: int
    guest_svn: int
    vmpl: int
    has_debug: bool
    has_migration_agent: bool
    report_data: bytes
    measurement: bytes
    host_data: bytes
    chip_id: bytes
    tcb: Tcb

    @classmethod
    def parse(cls, data: bytes) -> "SnpReport":
        """Read a report.

        Raises:
            AttestationError: it has another length, version, kind of signature or key, or reserved
                bytes that are not 0.
        """
        if len(data) != REPORT_BYTES:
            raise AttestationError(
                f"An SEV-SNP report has {REPORT_BYTES:,} bytes; this one has {len(data):,}."
            )
        version, guest_svn, policy = struct.unpack_from("<IIQ", data)
        vmpl, algorithm = struct.unpack_from("<II", data, 0x30)
        (flags,) = struct.unpack_from("<I", data, 0x48)
        if version not in VERSIONS:
            raise AttestationError(f"SEV-SNP reports of version {version} are not supported.")
        if algorithm != ECDSA_P384_SHA384:
            raise AttestationError("The report's signature is not ECDSA on P-384 with SHA-384.")
        if flags >> 2 & 7 != SIGNED_BY_VCEK:
            raise AttestationError("The report is signed by another key than a VCEK.")
        if flags & _MASKED_CHIP_ID:
            raise AttestationError("The platform hides its chip ID, so its key cannot be checked.")
        if any(data[SIGNED + 2 * NUMBER :]):
            raise AttestationError("The report has bytes after its signature.")
        return cls(
            signed=data[:SIGNED],
            r=int.from_bytes(data[SIGNED : SIGNED + NUMBER], "little"),
            s=int.from_bytes(data[SIGNED + NUMBER : SIGNED + 2 * NUMBER], "little"),
            guest_svn=guest_svn,
            vmpl=vmpl,
            has_debug=bool(policy & _DEBUG),
            has_migration_agent=bool(policy & _MIGRATION_AGENT)
            or data[0x160:0x180] not in _NO_AGENT,
            report_data=data[0x50:0x90],
            measurement=data[0x90:0xC0],
            host_data=data[0xC0:0xE0],
            chip_id=data[0x1A0:0x1E0],
            tcb=Tcb.of(data[0x180:0x188]),
        )
