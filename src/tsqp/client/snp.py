"""Verification of SEV-SNP: from AMD's root certificate to the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from tsqp.client.snp_report import SnpReport
from tsqp.client.verdict import Checks
from tsqp.client.x509_files import Material
from tsqp.errors import AttestationError

# SHA-256 of the DER of AMD's root certificates. Others come from the policy.
AMD_ROOTS = {"69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": "ARK-Milan"}

_OID = "1.3.6.1.4.1.3704.1."
_TCB_OIDS = {"boot_loader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8"}
_CHIP_ID_OID = "4"


@dataclass(frozen=True, slots=True)
class Chain:
    """The three certificates of a platform."""

    ark: x509.Certificate
    ask: x509.Certificate
    vcek: x509.Certificate


def verify_snp(
    report: SnpReport,
    material: Material,
    roots: dict[str, str],
    at: datetime,
    checks: Checks,
    *,
    require_crl: bool = False,
) -> datetime | None:
    """Check that a genuine platform made a report.

    Args:
        material: certificates in any order, and lists of revoked ones.
        roots: SHA-256 of trusted root certificates, in hexadecimal digits, and their names.
        at: the time at which certificates must be valid.
        checks: gets the results.
        require_crl: fail without a list of revoked certificates.

    Returns:
        when the newest list of revoked certificates was issued, of those that AMD signed and that
        are valid; None if there is none, or if one of them is wrong.
    """
    try:
        chain = _find_chain(material.certificates, roots, report)
    except (AttestationError, ValueError) as exc:
        checks.failed("certificates", str(exc))
        return None
    fingerprint = chain.ark.fingerprint(hashes.SHA256()).hex()
    checks.run("root", lambda: _check_root(fingerprint, roots))
    checks.run("certificates", lambda: _check_chain(chain, at))
    issued: list[datetime] = []

    def check_crls() -> str:
        issued.append(_check_crls(chain, material.crls, at))
        return f"the ASK is not revoked, as of {issued[0]:%Y-%m-%d}"

    if not material.crls and not require_crl:
        checks.not_required("revocation", "no list of revoked certificates was given")
    else:
        checks.run("revocation", check_crls)
    checks.run("chip", lambda: _check_chip(chain.vcek, report))
    checks.run("key's TCB", lambda: _check_key_tcb(chain.vcek, report))
    checks.run("signature", lambda: _check_signature(chain.vcek, report))
    return issued[0] if issued else None


def _find_chain(
    certificates: Sequence[x509.Certificate], roots: dict[str, str], report: SnpReport
) -> Chain:
    """Tell the certificates apart. Nothing about them is trusted yet."""
    vceks = [each for each in certificates if _is_ec(each) and _common_name(each) != "SEV-VLEK"]
    # A folder may have those of many machines, and of several versions of each.
    vceks = [each for each in vceks if _fits(each, report)] or vceks
    signers = [each for each in certificates if not _is_ec(each)]
    arks = [each for each in signers if each.subject == each.issuer]
    # A file of the policy's and the platform's own table may both have the root.
    arks.sort(key=lambda each: each.fingerprint(hashes.SHA256()).hex() not in roots)
    if not vceks or not arks:
        missing = "key certificate (VCEK)" if not vceks else "root certificate (ARK)"
        raise AttestationError(f"The platform's {missing} is missing: give it with --collateral.")
    vcek = vceks[0]
    asks = [e for e in signers if e.subject == vcek.issuer and e.subject != e.issuer]
    if not asks:
        raise AttestationError(
            "The intermediate certificate (ASK) is missing: give it with --collateral."
        )
    if len({each.fingerprint(hashes.SHA256()) for each in vceks}) > 1:
        raise AttestationError("There are several key certificates (VCEK): give only one.")
    return Chain(arks[0], asks[0], vcek)


def _fits(vcek: x509.Certificate, report: SnpReport) -> bool:
    try:
        _check_chip(vcek, report)
        _check_key_tcb(vcek, report)
    except AttestationError:
        return False
    return True


def _is_ec(certificate: x509.Certificate) -> bool:
    return isinstance(_public_key(certificate), ec.EllipticCurvePublicKey)


def _public_key(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except ValueError:
        raise AttestationError("A certificate has a key that cannot be used.") from None


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _check_root(fingerprint: str, roots: dict[str, str]) -> str:
    if fingerprint not in roots:
        raise AttestationError(
            f"the root certificate with SHA-256 {fingerprint} is not trusted; trusted are "
            f"{', '.join(sorted(set(roots.values()))) or 'none'}, and sev-snp.ark of the policy"
        )
    return f"{roots[fingerprint]}, SHA-256 {fingerprint}"


def _check_chain(chain: Chain, at: datetime) -> str:
    for name, certificate, issuer in (
        ("ARK", chain.ark, chain.ark),
        ("ASK", chain.ask, chain.ark),
        ("VCEK", chain.vcek, chain.ask),
    ):
        key = _public_key(issuer)
        if (
            certificate.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS
            or not isinstance(certificate.signature_hash_algorithm, hashes.SHA384)
            or not isinstance(key, rsa.RSAPublicKey)
            or key.key_size != 4096
        ):
            raise AttestationError(f"the {name} is not signed by RSA-4096 PSS with SHA-384")
        if not _is_ca(issuer):
            raise AttestationError(f"the issuer of the {name} may not sign certificates")
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            raise AttestationError(f"the signature of the {name} is wrong") from None
        if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise AttestationError(
                f"the {name} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d}"
            )
    return "VCEK, ASK and ARK are signed by one another and valid"


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False


def _check_crls(
    chain: Chain, crls: Sequence[x509.CertificateRevocationList], at: datetime
) -> datetime:
    """When the newest list was issued, after all of this root were checked."""
    own = [each for each in crls if each.issuer == chain.ark.subject]
    if not own:
        raise AttestationError("there is no list of revoked certificates (CRL) of this root")
    key = _public_key(chain.ark)
    for crl in own:
        if not isinstance(key, rsa.RSAPublicKey) or not crl.is_signature_valid(key):
            raise AttestationError("the signature of the list of revoked certificates is wrong")
        end = crl.next_update_utc
        if end is None or not crl.last_update_utc <= at <= end:
            raise AttestationError("the list of revoked certificates is not valid at this time")
        if crl.get_revoked_certificate_by_serial_number(chain.ask.serial_number) is not None:
            raise AttestationError("AMD has revoked the ASK")
    return max(each.last_update_utc for each in own)


def _check_chip(vcek: x509.Certificate, report: SnpReport) -> str:
    if _extension(vcek, _CHIP_ID_OID) != report.chip_id:
        raise AttestationError("the VCEK is of another chip than the report")
    return report.chip_id[:8].hex() + "…"


def _check_key_tcb(vcek: x509.Certificate, report: SnpReport) -> str:
    for name, oid in _TCB_OIDS.items():
        if _integer(_extension(vcek, oid)) != getattr(report.tcb, name):
            raise AttestationError(f"the VCEK is for another {name} version than the report's")
    return str(report.tcb)


def _check_signature(vcek: x509.Certificate, report: SnpReport) -> str:
    key = _public_key(vcek)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise AttestationError("the VCEK's key is not on P-384")
    try:
        key.verify(
            encode_dss_signature(report.r, report.s), report.signed, ec.ECDSA(hashes.SHA384())
        )
    except InvalidSignature:
        raise AttestationError("the report is not signed by the VCEK") from None
    return "the VCEK signed the report"


def _extension(certificate: x509.Certificate, oid: str) -> bytes:
    try:
        value = certificate.extensions.get_extension_for_oid(
            x509.ObjectIdentifier(_OID + oid)
        ).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        raise AttestationError(f"the VCEK lacks the extension {_OID}{oid}") from None
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def _integer(der: bytes) -> int:
    """A DER integer from 0 to 255."""
    match tuple(der):
        case (2, 1, value) if value < 0x80:
            return value
        case (2, 2, 0, value) if value >= 0x80:
            return value
    raise AttestationError("the VCEK has a version that is not a number from 0 to 255")
