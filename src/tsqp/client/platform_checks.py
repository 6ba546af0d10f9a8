"""Checks that all platforms share."""

from datetime import datetime

from tsqp.client.policy import Policy
from tsqp.client.verdict import Checks


def check_debug(has_debug: bool, what: str, checks: Checks) -> None:
    """No policy can allow debugging."""
    if has_debug:
        checks.failed("debug", f"the {what} can be debugged, so its memory can be read")
    else:
        checks.passed("debug", "off")


def check_age(issued: datetime | None, policy: Policy, at: datetime, checks: Checks) -> None:
    """Check how old the collateral is; None if none was given that has an age."""
    limit = policy.max_collateral_age_days
    if issued is None:
        found = "there is no collateral that has an age"
        if limit is None:
            checks.not_required("collateral", found)
        else:
            checks.failed("collateral", found)
        return
    days = (at - issued).total_seconds() / 86400
    found = f"issued {issued:%Y-%m-%dT%H:%M:%SZ}, {days:.1f} days before"
    if limit is None:
        checks.not_required("collateral age", found)
    elif 0 <= days <= limit:
        checks.passed("collateral age", found)
    else:
        checks.failed("collateral age", f"{found}; at most {limit:g} days are accepted")
