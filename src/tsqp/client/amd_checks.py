"""Checks of SEV-SNP: the report, and what the policy demands of the platform and the guest."""

from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes

from tsqp.api.evidence import Evidence
from tsqp.api.simulated_root import SIMULATED_ARK
from tsqp.client.collateral import MAX_FILE, Collateral, read_limited
from tsqp.client.platform_checks import check_age, check_debug
from tsqp.client.policy import Policy
from tsqp.client.snp import AMD_ROOTS, verify_snp
from tsqp.client.snp_report import SnpReport
from tsqp.client.verdict import Checks
from tsqp.client.x509_files import Material, load_certificates
from tsqp.errors import AttestationError

# The root of the simulated platform, whose private keys are public.
SIMULATED_ROOTS = {SIMULATED_ARK: "the simulated platform"}


def check_amd(
    evidence: Evidence, policy: Policy, collateral: Collateral, at: datetime, checks: Checks
) -> bytes | None:
    """Check an SEV-SNP report. Returns the report data that the platform signed, if it did."""
    demands = policy.sev_snp
    material = Material([*collateral.amd.certificates], [*collateral.amd.crls])
    roots: dict[str, str] = {}
    try:
        report = SnpReport.parse(evidence.quote)
        material.add_table(evidence.certificates)
        if evidence.platform == "sev-snp":
            roots = AMD_ROOTS if demands.ark is None else _policy_root(Path(demands.ark), material)
        elif policy.allow_simulated:
            roots = SIMULATED_ROOTS
    except AttestationError as exc:
        checks.failed("report", str(exc))
        checks.failed("measurement and TCB", "they cannot be checked: the report is not verified")
        return None
    failed_before = len(checks.failures)
    issued = verify_snp(report, material, roots, at, checks, require_crl=demands.require_crl)
    is_genuine = len(checks.failures) == failed_before
    check_age(issued, policy, at, checks)
    check_debug(report.has_debug, "guest", checks)
    if report.has_migration_agent and not demands.allow_migration_agent:
        checks.failed("migration", "an agent may move the guest; the policy does not allow it")
    else:
        checks.passed("migration", "agent" if report.has_migration_agent else "no agent")
    if report.vmpl <= demands.max_vmpl:
        checks.passed("VMPL", str(report.vmpl))
    else:
        checks.failed("VMPL", f"{report.vmpl}; at most {demands.max_vmpl} is accepted")
    if demands.min_tcb is None:
        checks.not_required("minimum TCB", str(report.tcb))
    else:
        for name in ("boot_loader", "tee", "snp", "microcode"):
            least = getattr(demands.min_tcb, name)
            checks.minimum(f"TCB {name}", getattr(report.tcb, name), least)
    checks.minimum("guest SVN", report.guest_svn, demands.min_guest_svn)
    checks.among("measurement", report.measurement.hex(), demands.measurement)
    checks.among("host data", report.host_data.hex(), demands.host_data)
    return report.report_data if is_genuine else None


def _policy_root(path: Path, material: Material) -> dict[str, str]:
    """Trust the root certificates in a file, and have them at hand for the chain."""
    data = read_limited(path, MAX_FILE)
    try:
        certificates = load_certificates(data)
    except ValueError:
        raise AttestationError("sev-snp.ark of the policy is not a certificate.") from None
    material.certificates.extend(certificates)
    return {each.fingerprint(hashes.SHA256()).hex(): "the policy's" for each in certificates}
