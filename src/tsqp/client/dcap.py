"""Verification of SGX and TDX, by dcap-qvl.

dcap-qvl checks the signatures from Intel's root certificate to the quote, the revocation lists, the
identity of the quoting enclave and the level of the platform. It gives the claims of a quote only
if all of this holds. Debugging, measurements and accepted levels are checked by `verify`.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import dcap_qvl

from tsqp.client.dcap_form import INTEL_ROOT, TEES, check_form
from tsqp.client.text import printable
from tsqp.errors import AttestationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Genuine:
    """What Intel says of a genuine quote.

    Attributes:
        report: the fields of the enclave's or guest's report, in hexadecimal digits or as integers.
        status: how up to date the platform is.
        advisories: Intel's advisories that apply to it.
        tcb_evaluation: number of Intel's evaluation that this follows.
        tcb_date: the platform has the updates up to this day.
    """

    report: dict[str, Any]
    status: str
    advisories: tuple[str, ...]
    tcb_evaluation: int
    tcb_date: date

    def data(self, name: str) -> bytes:
        """A field of the report as bytes."""
        return bytes.fromhex(self.report[name])


def verify_quote(
    quote: bytes, platform: str, collateral: str, at: datetime, root: bytes | None = None
) -> Genuine:
    """Verify a quote with Intel's collateral.

    Args:
        platform: sgx or tdx.
        collateral: as `dcap_qvl.QuoteCollateralV3.to_json` gives it.
        at: the time at which all certificates and lists must be valid.
        root: DER of the root certificate to trust instead of Intel's.

    Raises:
        AttestationError: anything is wrong with the quote or the collateral.
    """
    seconds = int(at.timestamp())
    if seconds < 0:
        raise AttestationError("the time is before 1970")
    verified = _call(
        lambda: dcap_qvl.QuoteVerifier(root).verify_with_policy(
            quote,
            dcap_qvl.QuoteCollateralV3.from_json(collateral),
            seconds,
            dcap_qvl.QuotePolicy.claims_only(seconds),
        )
    )
    trusted = INTEL_ROOT if root is None else hashlib.sha256(root).hexdigest()
    check_form(quote, platform, collateral, trusted)  # dcap-qvl has parsed both
    claims = json.loads(verified.to_json())
    if claims["tee_type"] != TEES[platform]:
        raise AttestationError(f"the quote is not of {platform}")
    [report] = claims["report"].values()
    # TDX 1.5 adds to the report of 1.0, which may be nested.
    report = {**report.get("base", {}), **report} if isinstance(report, dict) else {}
    return Genuine(
        report=report,
        status=claims["tcb"]["status"],
        advisories=tuple(claims["tcb"]["advisory_ids"]),
        tcb_evaluation=claims["tcb"]["eval_data_number"],
        tcb_date=datetime.fromtimestamp(claims["platform"]["tcb_date_tag"], UTC).date(),
    )


def platform_of(quote: bytes) -> tuple[str, str]:
    """The platform and FMSPC (kind of processor) that a quote says it is of, unverified.

    Raises:
        AttestationError: it is not a quote.
    """
    parsed = _call(lambda: dcap_qvl.parse_quote(quote))
    return ("tdx" if parsed.is_tdx() else "sgx"), _call(parsed.fmspc)


def _call(function: Any) -> Any:
    """The result of a function of dcap-qvl, or its error as ours.

    A panic in its Rust code is not an `Exception`, and must refuse the quote too.
    """
    try:
        return function()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:
        reason = printable(str(exc)).removeprefix("Verification failed: ")
        raise AttestationError(reason or "dcap-qvl cannot read it") from None
