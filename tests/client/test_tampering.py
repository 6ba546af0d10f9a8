"""One bit of a signed part is changed, and nothing of it is accepted any more."""

import base64
import json
import struct
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from fake_platform import NOW, FakePlatform
from samples import ANYTHING, AT, IntelSample, amd_files, milan_report

from tsqp.api.evidence import Evidence
from tsqp.client import amd_checks
from tsqp.client.collateral import Collateral, read_collateral
from tsqp.client.verify import verify_evidence
from tsqp.client.x509_files import Material
from tsqp.errors import AttestationError

HEX = {"root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"}
COLLATERAL = sorted(
    HEX
    | {"pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"}
    | {"tcb_info", "qe_identity"}
)
VARIANTS = 60  # of each part


def flipped(data: bytes, begin: int, end: int, count: int = VARIANTS) -> Iterator[bytes]:
    """Copies of the data with one bit changed, at places all over a range."""
    for number in range(min(count, end - begin)):
        place = begin + number * (end - begin) // min(count, end - begin)
        changed = bytearray(data)
        changed[place] ^= 1 << (number * 5 % 8)
        yield bytes(changed)


def quote_parts(sample: IntelSample) -> dict[str, tuple[int, int]]:
    """Where the parts of a quote are."""
    body = 48 + (384 if sample.platform == "sgx" else 584)
    signature = body + 4
    qe = signature + 128 + (0 if sample.platform == "sgx" else 6)
    (auth,) = struct.unpack_from("<H", sample.quote, qe + 448)
    chain = qe + 450 + auth + 6
    return {
        "header": (0, 48),
        "body": (48, body),
        "length": (body, signature),
        "signature": (signature, signature + 64),
        "key": (signature + 64, signature + 128),
        "QE report": (qe, qe + 384),
        "QE signature": (qe + 384, qe + 448),
        "QE authentication data": (qe + 448, chain - 6),
        "chain": (chain - 6, sample.quote.index(b"\0", chain)),
    }


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
@pytest.mark.parametrize("part", quote_parts(IntelSample("sgx", bytes(1100), {})))
def test_no_changed_quote_is_accepted(name: str, part: str) -> None:
    sample = IntelSample.read(name)
    assert sample.verdict().accepted
    variants = list(flipped(sample.quote, *quote_parts(sample)[part]))
    assert len(variants) >= min(VARIANTS, 4)
    accepted = [quote for quote in variants if sample.verdict(quote=quote).accepted]
    assert accepted == []


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
@pytest.mark.parametrize("part", COLLATERAL)
def test_no_changed_collateral_is_accepted(name: str, part: str) -> None:
    sample = IntelSample.read(name)
    text = sample.collateral[part]
    data = bytes.fromhex(text) if part in HEX else text.encode()
    tried = 0
    for changed in flipped(data, 0, len(data)):
        value = changed.hex() if part in HEX else changed.decode("latin-1")
        tried += 1
        assert not sample.verdict(collateral={**sample.collateral, part: value}).accepted
    assert tried >= 60


def test_no_changed_report_is_accepted() -> None:
    collateral = read_collateral(amd_files())
    report = milan_report()
    for changed in (*flipped(report, 0, 0x2A0, 0x2A0), *flipped(report, 0x2A0, 0x4A0, 200)):
        evidence = Evidence(platform="sev-snp", quote=changed, claims=b"")
        assert not verify_evidence(evidence, ANYTHING, at=AT, collateral=collateral).accepted


@pytest.mark.parametrize("which", [0, 1, 2], ids=["ARK", "ASK", "VCEK"])
def test_no_changed_certificate_of_a_report_is_accepted(which: int) -> None:
    ders = [
        each.public_bytes(Encoding.DER) for each in read_collateral(amd_files()).amd.certificates
    ]
    evidence = Evidence(platform="sev-snp", quote=milan_report(), claims=b"")
    for changed in flipped(ders[which], 0, len(ders[which]), 200):
        material = Material()
        try:
            for number, der in enumerate(ders):
                material.add(changed if number == which else der, "A certificate")
        except AttestationError:
            continue  # a user could not have given it
        collateral = Collateral(amd=material)
        assert not verify_evidence(evidence, ANYTHING, at=AT, collateral=collateral).accepted


def test_no_changed_revocation_list_is_accepted(platform: FakePlatform) -> None:
    der = platform.crl().public_bytes(Encoding.DER)
    evidence = platform.evidence()

    def is_refused(list_: bytes) -> bool:
        material = Material()
        try:
            material.add(list_, "A list")
        except AttestationError:
            return True  # a user could not have given it
        verdict = verify_evidence(evidence, ANYTHING, at=NOW, collateral=Collateral(amd=material))
        return "revocation" in {check.name for check in verdict.failures}

    assert not is_refused(der)
    assert all(is_refused(changed) for changed in flipped(der, 0, len(der), 200))


def test_no_changed_claims_are_accepted(
    platform: FakePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = platform.ark.fingerprint(hashes.SHA256()).hex()
    monkeypatch.setattr(amd_checks, "AMD_ROOTS", {root: "ours"})
    evidence = platform.evidence()
    assert verify_evidence(evidence, ANYTHING, at=NOW).accepted
    for claims in flipped(evidence.claims, 0, len(evidence.claims), 400):
        changed = Evidence(
            platform="sev-snp",
            quote=evidence.quote,
            claims=claims,
            certificates=evidence.certificates,
        )
        verdict = verify_evidence(changed, ANYTHING, at=NOW)
        assert "claims" in {check.name for check in verdict.failures}


def test_a_quote_of_ten_megabytes_is_refused_before_anything_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = IntelSample.read("tdx_quote")
    quote = sample.quote + bytes(10_000_000)  # a genuine one, with what Linux may add
    short = Evidence(platform="tdx", quote=sample.quote, claims=b"")
    fields = json.loads(short.to_json()) | {"quote": base64.b64encode(quote).decode()}
    for name in ("loads", "JSONDecoder"):
        monkeypatch.setattr(json, name, None)
    for read in (
        lambda: Evidence(platform="tdx", quote=quote, claims=b""),
        lambda: Evidence.from_json(json.dumps(fields).encode()),
        lambda: Evidence.from_extension(short.to_extension() + quote, "tdx"),
        lambda: sample.verdict(quote=quote),
    ):
        with pytest.raises(AttestationError, match=r"at most|more than"):
            read()
