"""Checks of SGX and TDX: the quote, and what the policy demands of the platform and the code."""

from datetime import datetime

from tsqp.api.evidence import Evidence
from tsqp.client import dcap
from tsqp.client.collateral import Collateral
from tsqp.client.platform_checks import check_age, check_debug
from tsqp.client.policy import Policy, SgxPolicy, TdxPolicy
from tsqp.client.verdict import Checks
from tsqp.errors import AttestationError

_SGX_DEBUG = 1 << 1  # of an enclave's attributes
_TDX_DEBUG = 0xFF  # of a guest's attributes: debugging and profiling
_TDX_MIGRATABLE = 1 << 29
_RTMRS = ("rtmr0", "rtmr1", "rtmr2", "rtmr3")


def check_intel(
    evidence: Evidence, policy: Policy, collateral: Collateral, at: datetime, checks: Checks
) -> bytes | None:
    """Check an SGX or TDX quote. Returns the report data that the platform signed, if it did."""
    platform = evidence.platform
    demands: SgxPolicy | TdxPolicy = policy.sgx if platform == "sgx" else policy.tdx
    try:
        _, fmspc = dcap.platform_of(evidence.quote)
        found = collateral.for_quote(platform, fmspc)
        genuine = dcap.verify_quote(evidence.quote, platform, found.text, at)
    except AttestationError as exc:
        checks.failed("quote", str(exc))
        checks.failed("measurement and TCB", "they cannot be checked: the quote is not verified")
        return None
    checks.passed("quote", f"signed by Intel's keys, on processors {fmspc}")
    check_age(found.issued, policy, at, checks)
    if genuine.status in policy.accepted_statuses:
        checks.passed("status", genuine.status)
    else:
        accepted = ", ".join(policy.accepted_statuses) or "none"
        checks.failed("status", f"{genuine.status}; accepted are {accepted}")
    _check_advisories(genuine.advisories, policy, checks)
    checks.minimum("TCB evaluation", genuine.tcb_evaluation, demands.min_tcb_evaluation)
    checks.minimum("TCB date", genuine.tcb_date, demands.min_tcb_date)
    if platform == "sgx":
        _check_enclave(genuine, policy.sgx, checks)
    else:
        _check_guest(genuine, policy.tdx, checks)
    return genuine.data("report_data")


def _check_enclave(genuine: dcap.Genuine, demands: SgxPolicy, checks: Checks) -> None:
    flags = int.from_bytes(genuine.data("attributes")[:8], "little")
    check_debug(bool(flags & _SGX_DEBUG), "enclave", checks)
    checks.among("mr_enclave", genuine.report["mr_enclave"], demands.mr_enclave)
    checks.among("mr_signer", genuine.report["mr_signer"], demands.mr_signer)
    product = genuine.report["isv_prod_id"]
    wanted = () if demands.product_id is None else (str(demands.product_id),)
    checks.among("product", str(product), wanted)
    checks.minimum("SVN", genuine.report["isv_svn"], demands.min_svn)


def _check_guest(genuine: dcap.Genuine, demands: TdxPolicy, checks: Checks) -> None:
    # Intel's module has neither a signer nor attributes; of another one they are not zero.
    if any(genuine.data("mr_signer_seam")) or any(genuine.data("seam_attributes")):
        checks.failed("TDX module", "it is not a release module of Intel's")
    else:
        checks.passed("TDX module", "Intel's")
    attributes = int.from_bytes(genuine.data("td_attributes"), "little")
    check_debug(bool(attributes & _TDX_DEBUG), "guest", checks)
    if attributes & _TDX_MIGRATABLE and not demands.allow_migration:
        checks.failed("migration", "the guest may be moved; the policy does not allow it")
    else:
        checks.passed("migration", "allowed" if attributes & _TDX_MIGRATABLE else "off")
    checks.among("mr_td", genuine.report["mr_td"], demands.mr_td)
    for number, name in enumerate(_RTMRS):
        checks.among(name, genuine.report[f"rt_mr{number}"], getattr(demands, name))
    checks.among("mr_config_id", genuine.report["mr_config_id"], demands.mr_config_id)


def _check_advisories(advisories: tuple[str, ...], policy: Policy, checks: Checks) -> None:
    found = ", ".join(advisories) or "none"
    if policy.accepted_advisories is None:
        checks.not_required("advisories", found)
        return
    wrong = sorted(set(advisories) - set(policy.accepted_advisories))
    if wrong:
        checks.failed("advisories", f"the policy does not accept {', '.join(wrong)}")
    else:
        checks.passed("advisories", found)
