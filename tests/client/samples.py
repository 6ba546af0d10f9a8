"""Evidence of real platforms, which is not a part of the project."""

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tsqp.api.evidence import Evidence
from tsqp.client.collateral import Collateral, IntelCollateral
from tsqp.client.policy import CURRENT_STATUSES, Policy
from tsqp.client.verdict import Verdict
from tsqp.client.verify import verify_evidence

AT = datetime(2025, 7, 4, tzinfo=UTC)  # when the collateral was valid
ANYTHING = Policy(
    platforms=("sgx", "tdx", "sev-snp"), any_measurement=True, accepted_statuses=CURRENT_STATUSES
)


def folder() -> Path:
    """The samples, beside the checkout or one of the folders around it."""
    places = (*Path(__file__).parents, *Path(sys.prefix).parents)  # mutants run in a copy
    for place in places:
        found = place / "shared" / "data" / "attestation"
        if found.is_dir():
            return found
    pytest.skip("the samples in shared/data/attestation are not here")


@dataclass
class IntelSample:
    """A quote with its collateral."""

    platform: str
    quote: bytes
    collateral: dict[str, str]

    @classmethod
    def read(cls, name: str) -> "IntelSample":
        quote = (folder() / name).read_bytes()
        collateral = json.loads((folder() / f"{name}_collateral.json").read_text())
        return cls(name[:3], quote, collateral)

    def verdict(
        self,
        policy: Policy = ANYTHING,
        at: datetime = AT,
        *,
        quote: bytes | None = None,
        collateral: dict[str, str] | None = None,
    ) -> Verdict:
        """The verdict, perhaps with another quote or collateral."""
        text = json.dumps(self.collateral if collateral is None else collateral)
        evidence = Evidence(
            platform=self.platform, quote=self.quote if quote is None else quote, claims=b""
        )
        try:
            given = [IntelCollateral.parse(text)]
        except (ValueError, KeyError, TypeError):  # then a user could not have given it
            given = []
        return verify_evidence(evidence, policy, at=at, collateral=Collateral(intel=given))


def amd_files() -> tuple[Path, ...]:
    """The certificates of the Milan sample."""
    names = ("snp_ark_milan.pem", "snp_ask_milan.pem", "snp_vcek_milan.der")
    return tuple(folder() / name for name in names)


def milan_report() -> bytes:
    return bytes.fromhex((folder() / "snp_report_milan.hex").read_text())


def failed(verdict: Verdict) -> set[str]:
    """The names of the checks that failed."""
    return {check.name for check in verdict.failures}
