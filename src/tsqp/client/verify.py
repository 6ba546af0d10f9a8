"""Evidence against a policy: every check, in order, with its result.

First the platform is checked, then the code that it measured, then what that code claims about
itself. Claims count only because measured code had their hash signed.
"""

from datetime import datetime

from tsqp.api.evidence import Evidence
from tsqp.client.amd_checks import check_amd
from tsqp.client.claims_checks import (
    check_claims,
    check_configuration,
    check_connection,
    check_demands,
)
from tsqp.client.collateral import Collateral
from tsqp.client.intel_checks import check_intel
from tsqp.client.policy import Policy
from tsqp.client.verdict import SIMULATED, Checks, Verdict


def verify_evidence(
    evidence: Evidence,
    policy: Policy,
    *,
    at: datetime,
    collateral: Collateral | None = None,
    public_key: bytes | None = None,
    nonce: bytes | None = None,
) -> Verdict:
    """Check evidence against a policy.

    Args:
        evidence: its claims may be empty if only a quote is at hand.
        at: the time to judge at; it has a time zone.
        collateral: see `read_collateral`.
        public_key: SHA-256 of the key that the server's end of a connection uses, a
            SubjectPublicKeyInfo in DER; None for evidence that did not come from a connection.
        nonce: what the server was asked with; None for evidence that did not come from a
            connection.

    Returns:
        the verdict. Nothing about the evidence raises an error.
    """
    checks = Checks()
    _check_platform(evidence.platform, policy, checks)
    collateral = collateral or Collateral()
    check = check_intel if evidence.platform in ("sgx", "tdx") else check_amd
    signed = None
    try:
        signed = check(evidence, policy, collateral, at, checks)
    except Exception as exc:  # hostile bytes that a library does not expect are refused too
        checks.failed("evidence", f"it cannot be checked ({type(exc).__name__})")
    claims = check_claims(evidence, signed, checks)
    check_connection(claims, public_key, nonce, checks)
    check_demands(claims, policy, checks)
    check_configuration(claims, evidence.configuration, policy, checks)
    return Verdict(platform=evidence.platform, at=at, checks=tuple(checks.made))


def _check_platform(platform: str, policy: Policy, checks: Checks) -> None:
    if platform != "simulated":
        checks.among("platform", platform, policy.platforms or ("none but simulated",))
    elif policy.allow_simulated:
        checks.passed("platform", f"{SIMULATED}; the policy has allow_simulated")
    else:
        checks.failed("platform", f"{SIMULATED}; the policy does not have allow_simulated")
