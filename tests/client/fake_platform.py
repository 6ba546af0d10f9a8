"""An SEV-SNP platform with keys of our own, as AMD makes them: chain, key certificate, reports."""

import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import Evidence, configuration_digest

BEGIN = datetime(2024, 1, 1, tzinfo=UTC)
NOW = datetime(2025, 1, 1, tzinfo=UTC)
END = datetime(2044, 1, 1, tzinfo=UTC)
CHIP = bytes(range(64))
MEASUREMENT = b"\xaa" * 48
TCB = {"3.1": 3, "3.2": 0, "3.3": 8, "3.8": 200}  # by the end of the extension's OID
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
CONFIGURATION = {"options": {"privacy": "pad", "threads": 2}, "server": {"api_keys": 1}}
DIGEST = "sha256:" + "5a" * 32


_keys: dict[tuple[str, int], rsa.RSAPrivateKey] = {}


def rsa_key(name: str, bits: int = 4096) -> rsa.RSAPrivateKey:
    """A key that is made once, because that takes long."""
    if (name, bits) not in _keys:
        _keys[name, bits] = rsa.generate_private_key(65537, bits)
    return _keys[name, bits]


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass
class FakePlatform:
    """A platform, and how it differs from an honest one.

    Attributes:
        tcb: what the key certificate says.
        chip: what the key certificate says.
        ask_is_ca: whether the intermediate certificate may sign others.
        ask_signer: name of the key that signs the intermediate certificate.
    """

    tcb: dict[str, int] = field(default_factory=lambda: dict(TCB))
    chip: bytes = CHIP
    ask_is_ca: bool = True
    ask_signer: str = "ark"
    ark_bits: int = 4096
    sign_padding: padding.AsymmetricPadding = field(default_factory=lambda: PSS)
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    begin: datetime = BEGIN
    end: datetime = END

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(self.curve)
        ark = rsa_key("ark", self.ark_bits)
        signer = ark if self.ask_signer == "ark" else rsa_key(self.ask_signer)
        self.ark = self._sign("ARK-Fake", "ARK-Fake", ark.public_key(), ark, is_ca=True)
        ask_key = rsa_key("ask").public_key()
        self.ask = self._sign("SEV-Fake", "ARK-Fake", ask_key, signer, is_ca=self.ask_is_ca)
        vcek_key = self.key.public_key()
        self.vcek = self._sign("SEV-VCEK", "SEV-Fake", vcek_key, rsa_key("ask"), vcek=True)

    def _sign(
        self,
        subject: str,
        issuer: str,
        public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
        signer: rsa.RSAPrivateKey,
        *,
        is_ca: bool = False,
        vcek: bool = False,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name_of(subject))
            .issuer_name(name_of(issuer))
            .public_key(public_key)
            .serial_number(7 + len(subject))
            .not_valid_before(self.begin)
            .not_valid_after(self.end)
        )
        if vcek:
            versions = {
                oid: b"\x02\x01" + bytes([value]) if value < 128 else b"\x02\x02\0" + bytes([value])
                for oid, value in self.tcb.items()
            }
            for oid, der in {**versions, "4": self.chip}.items():
                oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.3704.1.{oid}")
                builder = builder.add_extension(x509.UnrecognizedExtension(oid, der), False)
        else:
            builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True)
        return builder.sign(signer, hashes.SHA384(), rsa_padding=self.sign_padding)

    def report(self, data: bytes = bytes(64), **fields: tuple[str, object]) -> bytes:
        """A signed report.

        Args:
            fields: their place as `at_0x30`, with the form of `struct` and the value.
        """
        report = bytearray(1184)
        tcb = bytes((3, 0, 0, 0, 0, 0, 8, 200))
        struct.pack_into("<IIQ", report, 0, 2, 5, 0x30000)
        struct.pack_into("<I", report, 0x34, 1)
        for place, value in (
            (0x50, data), (0x90, MEASUREMENT), (0xC0, b"\xbb" * 32), (0x160, b"\xff" * 32),
            (0x180, tcb), (0x1A0, CHIP),
        ):  # fmt: skip
            report[place : place + len(value)] = value
        for name, (form, value) in fields.items():
            struct.pack_into(form, report, int(name.removeprefix("at_"), 16), value)
        signature = self.key.sign(bytes(report[:0x2A0]), ec.ECDSA(hashes.SHA384()))
        r, s = decode_dss_signature(signature)
        report[0x2A0:0x330] = r.to_bytes(72, "little") + s.to_bytes(72, "little")
        return bytes(report)

    def table(self, *more: x509.CertificateRevocationList) -> bytes:
        """The certificates, and lists, in the form of the GHCB specification."""
        ders = [each.public_bytes(Encoding.DER) for each in (self.vcek, self.ask, self.ark, *more)]
        head, body, begin = b"", b"", 24 * (len(ders) + 1)
        for number, der in enumerate(ders):
            head += struct.pack("<16sII", bytes([number + 1] * 16), begin + len(body), len(der))
            body += der
        return head + bytes(24) + body

    def crl(
        self,
        *revoked: int,
        signer: str = "ark",
        issuer: x509.Name | None = None,
        issued: datetime = NOW - timedelta(days=3),
        end: datetime = NOW + timedelta(days=9),
    ) -> x509.CertificateRevocationList:
        """A list of revoked certificates, three days old."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer or self.ark.subject)
            .last_update(issued)
            .next_update(end)
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(BEGIN)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(rsa_key(signer), hashes.SHA384(), rsa_padding=PSS)

    def evidence(
        self,
        public_key: bytes = b"k" * 32,
        nonce: bytes = b"n" * 32,
        platform: str = "sev-snp",
        **changes: object,
    ) -> Evidence:
        """What a server on this platform answers."""
        claims = Claims(
            **{
                "public_key": public_key,
                "nonce": nonce,
                "model_digest": DIGEST,
                "privacy": "pad",
                "field": "wide",
                "version": "0.1.0",
                "configuration": configuration_digest(CONFIGURATION),
                **changes,
            }  # type: ignore[arg-type]
        ).encode()
        return Evidence(
            platform=platform,
            quote=self.report(report_data(claims)),
            claims=claims,
            certificates=self.table(),
            configuration=CONFIGURATION,
        )
