"""What every platform gives: a quote over 64 bytes that the caller chose."""

from dataclasses import dataclass
from typing import Protocol

REPORT_DATA_BYTES = 64
AUTO, SIMULATED = "auto", "simulated"
CHOICES = (AUTO, SIMULATED)  # of a user: the platform that there is, or one that proves nothing


@dataclass(frozen=True, slots=True)
class Quote:
    """A signed statement of the platform about this process or virtual machine.

    Attributes:
        platform: "sgx", "tdx", "sev-snp" or "simulated".
        quote: a quote of SGX or TDX, or a report of SEV-SNP.
        certificates: SEV-SNP: the table of certificates that the host gave; else empty.
    """

    platform: str
    quote: bytes
    certificates: bytes = b""


class Provider(Protocol):
    """A platform that can attest this process."""

    @property
    def platform(self) -> str:
        """See `Quote.platform`; for a message, not for a decision."""

    def quote(self, report_data: bytes) -> Quote:
        """A quote that holds these 64 bytes. Takes up to some seconds; any thread may call it.

        Raises:
            AttestationError: the platform gives no quote, or one with other report data.
        """
