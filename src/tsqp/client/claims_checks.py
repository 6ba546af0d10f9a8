"""Checks of what measured code claims about itself."""

import json
from typing import Any

from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import Evidence, configuration_digest
from tsqp.client.policy import Policy
from tsqp.client.verdict import Checks
from tsqp.errors import AttestationError


def check_claims(evidence: Evidence, signed: bytes | None, checks: Checks) -> Claims | None:
    """The claims, if the platform signed their hash."""
    if not evidence.claims:
        found = "" if signed is None else f"; report data {signed.hex()}"
        checks.not_required("claims", f"none were given{found}")
        return None
    claims: list[Claims] = []

    def check() -> str:
        if signed is None:
            raise AttestationError("they cannot be checked: no platform signed them")
        if signed != report_data(evidence.claims):
            raise AttestationError("the platform signed other claims")
        claims.append(Claims.decode(evidence.claims))
        return "the platform signed their hash"

    checks.run("claims", check)
    return claims[0] if claims else None


def check_connection(
    claims: Claims | None, public_key: bytes | None, nonce: bytes | None, checks: Checks
) -> None:
    """Check that the evidence is of this connection's key, and made for this question."""
    for name, expected, attribute, wrong in (
        ("TLS key", public_key, "public_key", "the connection has another key than the attested"),
        ("nonce", nonce, "nonce", "the evidence answers another question, so it may be old"),
    ):
        if expected is None:
            checks.not_required(name, "the evidence did not come from a connection")
        elif claims is None:
            checks.failed(name, "it cannot be checked without verified claims")
        elif getattr(claims, attribute) != expected:
            checks.failed(name, wrong)
        else:
            checks.passed(name, expected.hex())


def check_demands(claims: Claims | None, policy: Policy, checks: Checks) -> None:
    """Check the values that the policy demands."""
    for name, accepted in (
        ("model_digest", policy.model_digest),
        ("privacy", policy.privacy),
        ("field", policy.field),
        ("version", policy.version),
    ):
        label = name.replace("_", " ")
        if claims is not None:
            checks.among(label, getattr(claims, name) or "none", accepted)
        elif accepted:
            checks.failed(label, "it cannot be checked without verified claims")
        else:
            checks.not_required(label, "unknown")


def check_configuration(
    claims: Claims | None, configuration: dict[str, Any] | None, policy: Policy, checks: Checks
) -> None:
    """Check a configuration against the claims, and the settings that the policy demands."""
    if claims is None or configuration is None:
        for name, _ in _settings(policy.configuration):
            checks.failed(name, "it cannot be checked: the configuration is not known")
        if not policy.configuration:
            checks.not_required("configuration", "unknown")
        return
    if configuration_digest(configuration) != claims.configuration:
        checks.failed("configuration", "it has another hash than the attested")
        return
    if not policy.configuration:
        checks.not_required("configuration", f"SHA-256 {claims.configuration.hex()}")
        return
    checks.passed("configuration", f"SHA-256 {claims.configuration.hex()}")
    actual = dict(_settings(configuration))
    for name, expected in _settings(policy.configuration):
        if name not in actual:
            checks.failed(name, "the server has no such setting")
        elif _is_same(actual[name], expected):
            checks.passed(name, _shown(expected))
        else:
            found = _shown(actual[name])
            checks.failed(name, f"{found}; the policy requires {_shown(expected)}")


def _settings(table: dict[str, Any], prefix: str = "configuration") -> list[tuple[str, Any]]:
    """The settings of nested tables, by their names with dots."""
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        if isinstance(value, dict) and value:
            found += _settings(value, f"{prefix}.{name}")
        else:
            found.append((f"{prefix}.{name}", value))
    return found


def _is_same(found: Any, expected: Any) -> bool:
    """Equality in which true is not 1."""
    return bool(found == expected) and isinstance(found, bool) == isinstance(expected, bool)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
