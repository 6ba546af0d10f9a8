"""SEV-SNP with a platform of our own: each thing that can be wrong is refused for itself."""

import struct
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding
from fake_platform import BEGIN, END, MEASUREMENT, NOW, TCB, FakePlatform, name_of
from samples import ANYTHING, failed

from tsqp.api.evidence import Evidence
from tsqp.client.collateral import Collateral
from tsqp.client.policy import MinTcb, Policy, SnpPolicy
from tsqp.client.verdict import Verdict
from tsqp.client.verify import verify_evidence
from tsqp.client.x509_files import Material


@pytest.fixture
def judge(platform: FakePlatform, tmp_path: Path) -> Callable[..., Verdict]:
    """Verifies with the root of our platform."""

    def verdict(
        quote: bytes,
        by: FakePlatform = platform,
        *,
        policy: Policy = ANYTHING,
        at: object = NOW,
        crls: tuple[object, ...] = (),
        table: bytes | None = None,
        certificates: tuple[object, ...] = (),
        **demands: object,
    ) -> Verdict:
        ark = tmp_path / "ark.pem"
        ark.write_bytes(by.ark.public_bytes(Encoding.PEM))
        snp = SnpPolicy(ark=str(ark), **demands)  # type: ignore[arg-type]
        table = by.table() if table is None else table
        evidence = Evidence(platform="sev-snp", quote=quote, claims=b"", certificates=table)
        return verify_evidence(
            evidence,
            msgspec.structs.replace(policy, sev_snp=snp),
            at=at,  # type: ignore[arg-type]
            collateral=Collateral(amd=Material(list(certificates), list(crls))),  # type: ignore[arg-type]
        )

    return verdict


Judge = Callable[..., Verdict]


def test_an_honest_report_is_accepted(platform: FakePlatform, judge: Judge) -> None:
    assert judge(platform.report()).accepted
    for version in (3, 4, 5):
        assert judge(platform.report(at_0x0=("<I", version))).accepted


def test_the_key_certificates_of_other_machines_may_lie_beside(
    platform: FakePlatform, judge: Judge
) -> None:
    others = FakePlatform(chip=bytes(64)).vcek, FakePlatform(tcb={**TCB, "3.1": 2}).vcek
    assert judge(platform.report(), certificates=others).accepted
    twin = FakePlatform().vcek  # of this chip and TCB, with another key
    assert failed(judge(platform.report(), certificates=(twin,))) == {"certificates"}


def test_an_unknown_root_is_refused(platform: FakePlatform) -> None:
    evidence = Evidence(
        platform="sev-snp", quote=platform.report(), claims=b"", certificates=platform.table()
    )
    assert failed(verify_evidence(evidence, ANYTHING, at=NOW)) == {"root"}


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"at_0x8": ("<Q", 0x30000 | 1 << 19)}, {"debug"}),
        ({"at_0x8": ("<Q", 0x30000 | 1 << 18)}, {"migration"}),
        ({"at_0x160": ("32s", b"\x01" * 32)}, {"migration"}),
        ({"at_0x30": ("<I", 1)}, {"VMPL"}),
        ({"at_0x0": ("<I", 1)}, {"report", "measurement and TCB"}),
        ({"at_0x0": ("<I", 6)}, {"report", "measurement and TCB"}),
        ({"at_0x34": ("<I", 2)}, {"report", "measurement and TCB"}),
        ({"at_0x48": ("<I", 1 << 2)}, {"report", "measurement and TCB"}),
        ({"at_0x48": ("<I", 2)}, {"report", "measurement and TCB"}),
        ({"at_0x184": ("<B", 1)}, {"report", "measurement and TCB"}),
        ({"at_0x180": ("<B", 4)}, {"key's TCB"}),
        ({"at_0x181": ("<B", 1)}, {"key's TCB"}),
        ({"at_0x186": ("<B", 9)}, {"key's TCB"}),
        ({"at_0x187": ("<B", 201)}, {"key's TCB"}),
        ({"at_0x1A0": ("64s", b"\x01" * 64)}, {"chip"}),
    ],
)
def test_a_signed_report_with_one_wrong_field_is_refused(
    platform: FakePlatform, judge: Judge, fields: dict[str, object], wrong: set[str]
) -> None:
    assert failed(judge(platform.report(**fields))) == wrong  # type: ignore[arg-type]


def test_bytes_after_the_signature_are_refused(platform: FakePlatform, judge: Judge) -> None:
    report = bytearray(platform.report())
    report[-1] = 1
    assert "report" in failed(judge(bytes(report)))


def test_a_signature_of_zeros_is_refused(platform: FakePlatform, judge: Judge) -> None:
    assert failed(judge(platform.report()[:0x2A0] + bytes(0x200))) == {"signature"}


def test_a_report_of_another_platform_is_refused(judge: Judge) -> None:
    assert failed(judge(FakePlatform().report())) == {"signature"}


@pytest.mark.parametrize(
    ("difference", "wrong"),
    [
        ({"tcb": {**TCB, "3.1": 2}}, {"key's TCB"}),
        ({"tcb": {**TCB, "3.8": 72}}, {"key's TCB"}),
        ({"tcb": {"3.1": 3, "3.2": 0, "3.3": 8}}, {"key's TCB"}),
        ({"chip": bytes(64)}, {"chip"}),
        ({"chip": b""}, {"chip"}),
        ({"ask_is_ca": False}, {"certificates"}),
        ({"ask_signer": "another"}, {"certificates"}),
        ({"ark_bits": 2048}, {"certificates"}),
        ({"sign_padding": padding.PKCS1v15()}, {"certificates"}),
        ({"curve": ec.SECP256R1()}, {"signature"}),
        ({"begin": NOW + timedelta(days=1)}, {"certificates"}),
        ({"end": NOW - timedelta(days=1)}, {"certificates"}),
    ],
)
def test_a_platform_with_one_wrong_certificate_is_refused(
    judge: Judge, difference: dict[str, object], wrong: set[str]
) -> None:
    other = FakePlatform(**difference)  # type: ignore[arg-type]
    assert failed(judge(other.report(), other)) == wrong


def test_certificates_count_only_while_they_are_valid(platform: FakePlatform, judge: Judge) -> None:
    for at in (BEGIN - timedelta(seconds=1), END + timedelta(seconds=1)):
        assert failed(judge(platform.report(), at=at)) == {"certificates"}


def test_lists_of_revoked_certificates_are_heeded(platform: FakePlatform, judge: Judge) -> None:
    report, ask = platform.report(), platform.ask.serial_number
    assert judge(report, crls=(platform.crl(12345),)).accepted
    assert judge(report, crls=(platform.crl(),), require_crl=True).accepted
    for crl in (
        platform.crl(12345, ask),
        platform.crl(signer="another"),
        platform.crl(end=NOW - timedelta(days=1)),
    ):
        assert failed(judge(report, crls=(crl,))) == {"revocation"}
    assert failed(judge(report, require_crl=True)) == {"revocation"}


def test_a_list_of_revoked_certificates_may_not_be_too_old(
    platform: FakePlatform, judge: Judge
) -> None:
    for days, wrong in ((4.0, set()), (2.0, {"collateral age"})):
        policy = msgspec.structs.replace(ANYTHING, max_collateral_age_days=days)
        crls = (platform.crl(),)
        assert failed(judge(platform.report(), policy=policy, crls=crls)) == wrong


def test_the_age_of_a_list_counts_only_after_its_signature(
    platform: FakePlatform, judge: Judge
) -> None:
    """A list of anybody, with the name of another root, must not make an old one look new."""
    policy = msgspec.structs.replace(ANYTHING, max_collateral_age_days=2.0)
    forged = platform.crl(signer="another", issuer=name_of("another"), issued=NOW)
    for crls in ((platform.crl(), forged), (platform.crl(signer="another", issued=NOW),), ()):
        verdict = judge(platform.report(), policy=policy, crls=crls)
        assert failed(verdict) & {"collateral", "collateral age"}


def test_the_table_of_the_host_gives_certificates_only(
    platform: FakePlatform, judge: Judge
) -> None:
    policy = msgspec.structs.replace(ANYTHING, max_collateral_age_days=7.0)
    table = platform.table(platform.crl())  # well signed, but the host may have kept it
    assert failed(judge(platform.report(), policy=policy, table=table)) == {"collateral"}
    assert failed(judge(platform.report(), table=table, require_crl=True)) == {"revocation"}
    assert judge(platform.report(), table=table).accepted


@pytest.mark.parametrize(
    ("demands", "wrong"),
    [
        ({"measurement": ("00" * 48, MEASUREMENT.hex())}, set()),
        ({"measurement": ("00" * 48,)}, {"measurement"}),
        ({"host_data": ("bb" * 32,)}, set()),
        ({"host_data": ("bc" * 32,)}, {"host data"}),
        ({"min_guest_svn": 5}, set()),
        ({"min_guest_svn": 6}, {"guest SVN"}),
        ({"min_tcb": MinTcb(boot_loader=3, tee=0, snp=8, microcode=200)}, set()),
        ({"min_tcb": MinTcb(boot_loader=4)}, {"TCB boot_loader"}),
        ({"min_tcb": MinTcb(tee=1)}, {"TCB tee"}),
        ({"min_tcb": MinTcb(snp=9)}, {"TCB snp"}),
        ({"min_tcb": MinTcb(microcode=201)}, {"TCB microcode"}),
    ],
)
def test_demands_on_a_guest_are_checked(
    platform: FakePlatform, judge: Judge, demands: dict[str, object], wrong: set[str]
) -> None:
    assert failed(judge(platform.report(), **demands)) == wrong


def test_a_policy_may_allow_other_levels_and_migration(
    platform: FakePlatform, judge: Judge
) -> None:
    report = platform.report(at_0x8=("<Q", 0x30000 | 1 << 18), at_0x30=("<I", 2))
    assert judge(report, max_vmpl=2, allow_migration_agent=True).accepted


def test_malformed_tables_of_certificates_are_refused(platform: FakePlatform) -> None:
    table = platform.table()
    for wrong in (
        table[:30],
        table[:-1],
        struct.pack("<16sII", b"x" * 16, 0, 2**31) + table[24:],
        struct.pack("<16sII", b"x" * 16, 2**32 - 1, 10) + table[24:],
        struct.pack("<16sII", b"x" * 16, 100, 50) + table[24:],
        b"\1" * 500,
    ):
        evidence = Evidence(
            platform="sev-snp", quote=platform.report(), claims=b"", certificates=wrong
        )
        assert "report" in failed(verify_evidence(evidence, ANYTHING, at=NOW))
