"""Evidence of real platforms is accepted at its time, and at no other, and demands are checked."""

from datetime import UTC, date, datetime, timedelta

import msgspec
import pytest
from samples import ANYTHING, AT, IntelSample, amd_files, failed, folder, milan_report

from tsqp.api.evidence import Evidence
from tsqp.client import dcap, intel_checks
from tsqp.client.collateral import Collateral, read_collateral
from tsqp.client.policy import Policy, SgxPolicy, SnpPolicy, TdxPolicy
from tsqp.client.verdict import Verdict
from tsqp.client.verify import verify_evidence
from tsqp.errors import AttestationError

INTEL = ("sgx_quote", "tdx_quote")


@pytest.mark.parametrize(
    ("name", "status", "measured"),
    [
        ("sgx_quote", "ConfigurationAndSWHardeningNeeded", ("mr_enclave", "33d8736d")),
        ("tdx_quote", "UpToDate", ("mr_td", "91eb2b44")),
    ],
)
def test_a_quote_is_accepted_at_the_time_of_its_collateral(
    name: str, status: str, measured: tuple[str, str]
) -> None:
    verdict = IntelSample.read(name).verdict()
    found = {check.name: check for check in verdict.checks}
    assert verdict.accepted
    assert (found["status"].outcome, found["status"].detail) == ("pass", status)
    assert found[measured[0]].detail.startswith(measured[1])


def amd_verdict(report: bytes, policy: Policy = ANYTHING, at: datetime = AT) -> Verdict:
    evidence = Evidence(platform="sev-snp", quote=report, claims=b"")
    return verify_evidence(evidence, policy, at=at, collateral=read_collateral(amd_files()))


def test_a_report_of_milan_is_accepted() -> None:
    verdict = amd_verdict(milan_report())
    assert verdict.accepted
    assert {"root", "certificates", "chip", "key's TCB", "signature", "debug"} <= {
        check.name for check in verdict.checks if check.outcome == "pass"
    }


def test_a_report_of_a_guest_under_debug_is_refused() -> None:
    verdict = amd_verdict((folder() / "snp_report_debug.bin").read_bytes())
    assert "debug" in failed(verdict)


@pytest.mark.parametrize("at", [AT, datetime(2026, 2, 20, tzinfo=UTC)])
def test_a_platform_without_updates_is_refused(at: datetime) -> None:
    everything = msgspec.structs.replace(
        ANYTHING, accepted_statuses=("UpToDate", "OutOfDate", "OutOfDateConfigurationNeeded")
    )
    verdict = IntelSample.read("tdx_quote_outdated").verdict(everything, at)
    assert "quote" in failed(verdict)
    if at != AT:
        assert "No matching TCB level found" in verdict.text()


@pytest.mark.parametrize("name", INTEL)
@pytest.mark.parametrize("days", [-3650, -30, -16, 16, 30, 3650])
def test_collateral_that_is_not_valid_at_the_time_is_refused(name: str, days: int) -> None:
    verdict = IntelSample.read(name).verdict(at=AT + timedelta(days=days))
    assert "quote" in failed(verdict)


def test_a_clock_before_1970_is_refused() -> None:
    past = datetime(1960, 1, 1, tzinfo=UTC)
    assert "quote" in failed(IntelSample.read("sgx_quote").verdict(at=past))
    assert "certificates" in failed(amd_verdict(milan_report(), at=past))


@pytest.mark.parametrize("name", INTEL)
def test_another_root_is_refused(name: str) -> None:
    sample = IntelSample.read(name)
    text = (folder() / f"{name}_collateral.json").read_text()
    root = (folder() / "snp_vcek_milan.der").read_bytes()
    with pytest.raises(AttestationError):
        dcap.verify_quote(sample.quote, sample.platform, text, AT, root)


def test_collateral_of_another_processor_is_not_used() -> None:
    sgx, tdx = (IntelSample.read(name) for name in INTEL)
    assert "quote" in failed(sgx.verdict(collateral=tdx.collateral))
    assert "there is no collateral" in sgx.verdict(collateral={}).text()


def test_a_quote_of_another_platform_is_refused() -> None:
    sgx, tdx = (IntelSample.read(name) for name in INTEL)
    assert failed(sgx.verdict(quote=tdx.quote))
    assert failed(tdx.verdict(quote=sgx.quote))


@pytest.mark.parametrize("name", INTEL)
def test_a_quote_that_is_cut_short_or_too_long_is_refused(name: str) -> None:
    sample = IntelSample.read(name)
    for length in (0, 1, 7, 47, 48, 432, 436, 632, 1000, 2000, 4000, 4599):
        assert "quote" in failed(sample.verdict(quote=sample.quote[:length]))
    assert "quote" in failed(sample.verdict(quote=sample.quote + b"\1"))
    assert sample.verdict(quote=sample.quote + bytes(100)).accepted  # as Linux pads it


def test_a_report_of_another_length_is_refused() -> None:
    for report in (b"", milan_report()[:-1], milan_report() + b"\0", bytes(1184)):
        assert "report" in failed(amd_verdict(report))


def test_reports_need_certificates() -> None:
    evidence = Evidence(platform="sev-snp", quote=milan_report(), claims=b"")
    for files in ((), amd_files()[:1], amd_files()[:2], amd_files()[1:], amd_files()[::2]):
        verdict = verify_evidence(evidence, ANYTHING, at=AT, collateral=read_collateral(files))
        assert "certificates" in failed(verdict)


def sgx_policy(**demands: object) -> Policy:
    return Policy(
        platforms=("sgx",),
        any_measurement=True,
        accepted_statuses=("ConfigurationAndSWHardeningNeeded",),
        sgx=SgxPolicy(**demands),  # type: ignore[arg-type]
    )


SIGNER = "815f42f11cf64430c30bab7816ba596a1da0130c3b028b673133a66cf9a3e0e6"
ENCLAVE = "33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"
OTHER = "00" * 32


@pytest.mark.parametrize(
    ("demands", "wrong"),
    [
        ({"mr_enclave": (OTHER, ENCLAVE)}, set()),
        ({"mr_enclave": (OTHER,)}, {"mr_enclave"}),
        ({"mr_signer": (SIGNER,), "product_id": 0, "min_svn": 0}, set()),
        ({"mr_signer": (OTHER,), "product_id": 0, "min_svn": 0}, {"mr_signer"}),
        ({"mr_signer": (SIGNER,), "product_id": 1, "min_svn": 0}, {"product"}),
        ({"mr_signer": (SIGNER,), "product_id": 0, "min_svn": 1}, {"SVN"}),
        ({"min_tcb_evaluation": 17, "min_tcb_date": date(2024, 3, 13)}, set()),
        ({"min_tcb_evaluation": 18}, {"TCB evaluation"}),
        ({"min_tcb_date": date(2024, 3, 14)}, {"TCB date"}),
    ],
)
def test_demands_on_an_enclave_are_checked(demands: dict[str, object], wrong: set[str]) -> None:
    assert failed(IntelSample.read("sgx_quote").verdict(sgx_policy(**demands))) == wrong


@pytest.mark.parametrize("name", ["mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id"])
def test_demands_on_a_guest_of_tdx_are_checked(name: str) -> None:
    sample = IntelSample.read("tdx_quote")
    [found] = [each.detail for each in sample.verdict().checks if each.name == name]
    for value, wrong in ((found.partition(";")[0], set()), ("ab" * 48, {name})):
        tdx = TdxPolicy(**{name: (value,)})
        policy = Policy(platforms=("tdx",), any_measurement=True, tdx=tdx)
        assert failed(sample.verdict(policy)) == wrong


def test_a_status_counts_only_if_the_policy_accepts_it() -> None:
    strict = msgspec.structs.replace(ANYTHING, accepted_statuses=("UpToDate",))
    assert failed(IntelSample.read("sgx_quote").verdict(strict)) == {"status"}


def test_advisories_count_only_if_the_policy_names_some() -> None:
    for accepted, wrong in (
        (("INTEL-SA-00289", "INTEL-SA-00615"), set()),
        (("INTEL-SA-00289",), {"advisories"}),
        ((), {"advisories"}),
    ):
        policy = msgspec.structs.replace(ANYTHING, accepted_advisories=accepted)
        assert failed(IntelSample.read("sgx_quote").verdict(policy)) == wrong


def test_collateral_may_not_be_older_than_the_policy_says() -> None:
    for days, wrong in ((15.0, set()), (14.0, {"collateral age"}), (0.0, {"collateral age"})):
        policy = msgspec.structs.replace(ANYTHING, max_collateral_age_days=days)
        assert failed(IntelSample.read("sgx_quote").verdict(policy)) == wrong
    # The list of revoked keys is older than the rest.
    policy = msgspec.structs.replace(ANYTHING, max_collateral_age_days=14.58)
    assert failed(IntelSample.read("tdx_quote").verdict(policy)) == {"collateral age"}
    policy = msgspec.structs.replace(ANYTHING, max_collateral_age_days=1000.0)
    assert failed(amd_verdict(milan_report(), policy)) == {"collateral"}


def add_attribute(monkeypatch: pytest.MonkeyPatch, field: str, place: int, bits: int) -> None:
    """Let genuine quotes have attributes that no sample has."""
    genuine = dcap.verify_quote

    def changed(*arguments: object) -> dcap.Genuine:
        found = genuine(*arguments)  # type: ignore[arg-type]
        flags = bytearray.fromhex(found.report[field])
        flags[place] |= bits
        found.report[field] = flags.hex()
        return found

    monkeypatch.setattr(intel_checks.dcap, "verify_quote", changed)


def test_an_enclave_under_debug_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_attribute(monkeypatch, "attributes", 0, 2)
    assert failed(IntelSample.read("sgx_quote").verdict()) == {"debug"}


@pytest.mark.parametrize("bit", range(8))
def test_a_guest_under_debug_is_refused(monkeypatch: pytest.MonkeyPatch, bit: int) -> None:
    add_attribute(monkeypatch, "td_attributes", 0, 1 << bit)
    assert failed(IntelSample.read("tdx_quote").verdict()) == {"debug"}


@pytest.mark.parametrize("field", ["mr_signer_seam", "seam_attributes"])
def test_a_tdx_module_that_is_not_a_release_of_intel_is_refused(
    monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    add_attribute(monkeypatch, field, 0, 1)
    assert failed(IntelSample.read("tdx_quote").verdict()) == {"TDX module"}


def test_a_guest_that_may_be_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_attribute(monkeypatch, "td_attributes", 3, 0x20)
    sample = IntelSample.read("tdx_quote")
    assert failed(sample.verdict()) == {"migration"}
    allowed = msgspec.structs.replace(ANYTHING, tdx=TdxPolicy(allow_migration=True))
    assert sample.verdict(allowed).accepted


def test_a_platform_that_the_policy_does_not_name_is_refused() -> None:
    tdx_only = msgspec.structs.replace(ANYTHING, platforms=("tdx",))
    assert failed(IntelSample.read("sgx_quote").verdict(tdx_only)) == {"platform"}


def test_everything_that_is_not_demanded_is_said_to_be_so() -> None:
    text = IntelSample.read("sgx_quote").verdict().text()
    for name in ("mr_enclave", "mr_signer", "advisories", "nonce", "TLS key", "model digest"):
        [line] = [each for each in text.splitlines() if f"  {name} " in each]
        assert line.endswith("not required by the policy")


def test_amd_roots_other_than_the_built_in_one_come_from_the_policy() -> None:
    ark, ask, _ = amd_files()
    other = SnpPolicy(ark=str(ask))  # a certificate, but not the root
    policy = msgspec.structs.replace(ANYTHING, sev_snp=other)
    assert "root" in failed(amd_verdict(milan_report(), policy))
    policy = msgspec.structs.replace(ANYTHING, sev_snp=SnpPolicy(ark=str(ark)))
    assert amd_verdict(milan_report(), policy).accepted


def test_no_collateral_at_all_is_refused() -> None:
    for platform, quote in (("sgx", b""), ("tdx", b"x" * 5000), ("sev-snp", b"")):
        evidence = Evidence(platform=platform, quote=quote, claims=b"")
        assert not verify_evidence(evidence, ANYTHING, at=AT, collateral=Collateral()).accepted
