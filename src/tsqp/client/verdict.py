"""The result of a verification: one line for each check, and whether all passed."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tsqp.client.text import printable
from tsqp.errors import AttestationError

Outcome = Literal["pass", "fail", "not required"]
SIMULATED = "simulated: proves nothing"
_UNDEMANDED = "not required by the policy"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was examined.

    Attributes:
        name: what was examined.
        outcome: pass, fail, or "not required" if the policy does not ask for it.
        detail: what was found, and why it failed.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All checks of one verification.

    Attributes:
        platform: which the evidence is of.
        at: the time at which it was judged.
        checks: in the order in which they were made.
    """

    platform: str
    at: datetime
    checks: tuple[Check, ...]

    @property
    def accepted(self) -> bool:
        """Whether no check failed, and at least one passed."""
        outcomes = [check.outcome for check in self.checks]
        return "fail" not in outcomes and "pass" in outcomes

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == "fail")

    def require(self) -> None:
        """Raise AttestationError, which names all failed checks, unless the verdict is accepted."""
        if not self.accepted:
            reasons = "; ".join(f"{check.name}: {check.detail}" for check in self.failures)
            raise AttestationError(f"The server is not verified. {reasons}")

    def text(self) -> str:
        """One line for each check, then the verdict."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [
            f"{_MARKS[check.outcome]}  {check.name:<{width}}  {check.detail}"
            for check in self.checks
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One sentence."""
        time = f"{self.at:%Y-%m-%dT%H:%M:%SZ}"
        if not self.accepted:
            number = len(self.failures)
            return f"REFUSED at {time}: {number} {'check' if number == 1 else 'checks'} failed."
        if self.platform == "simulated":
            return f"Accepted at {time}, but {SIMULATED}."
        return f"Accepted at {time}."

    def json(self) -> str:
        """The verdict as a JSON object on one line."""
        return json.dumps(
            {
                "accepted": self.accepted,
                "platform": self.platform,
                "at": self.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "note": SIMULATED if self.platform == "simulated" else None,
                "checks": [asdict(check) for check in self.checks],
            }
        )


_MARKS = {"pass": "pass", "fail": "FAIL", "not required": "  – "}


@dataclass
class Checks:
    """Collects checks. A failed one does not end the others, so that a user sees all reasons."""

    made: list[Check] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """Those that failed so far."""
        return [check for check in self.made if check.outcome == "fail"]

    def run(self, name: str, check: Callable[[], str]) -> None:
        """Make a check.

        Args:
            check: returns what it found, or raises AttestationError with the reason.
        """
        try:
            self.passed(name, check())
        except AttestationError as exc:
            self.failed(name, str(exc))
        except Exception as exc:  # hostile bytes that a library does not expect are refused too
            self.failed(name, f"it cannot be checked ({type(exc).__name__})")

    def passed(self, name: str, detail: str) -> None:
        """Add a check that passed."""
        self._add(name, "pass", detail)

    def failed(self, name: str, detail: str) -> None:
        """Add a check that failed."""
        self._add(name, "fail", detail)

    def not_required(self, name: str, found: str) -> None:
        """Add what was found where the policy accepts everything."""
        self._add(name, "not required", f"{found}; {_UNDEMANDED}")

    def among(self, name: str, found: str, accepted: tuple[str, ...]) -> None:
        """Check that what was found is one of the accepted values; if there are none, any is."""
        if not accepted:
            self.not_required(name, found)
        elif found in accepted:
            self.passed(name, found)
        else:
            values = " or ".join(accepted)
            self.failed(name, f"{found}; the policy requires {values}")

    def minimum(self, name: str, found: Any, least: Any) -> None:
        """Check that what was found is not less than the policy's minimum; None demands nothing."""
        if least is None:
            self.not_required(name, str(found))
        elif found >= least:
            self.passed(name, str(found))
        else:
            self.failed(name, f"{found}; the policy requires {least} or more")

    def _add(self, name: str, outcome: Outcome, detail: str) -> None:
        self.made.append(Check(name, outcome, printable(detail)))
