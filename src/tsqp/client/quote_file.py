"""Evidence from files."""

from contextlib import suppress
from pathlib import Path

from tsqp.api.claims import MAX_CLAIMS
from tsqp.api.evidence import MAX_JSON, Evidence
from tsqp.client.collateral import read_limited
from tsqp.client.dcap import platform_of
from tsqp.client.snp_report import REPORT_BYTES
from tsqp.errors import AttestationError, UsageError, printable_path


def read_evidence(path: Path, claims: Path | None) -> Evidence:
    """Read a quote of SGX or TDX, a report of SEV-SNP (in bytes or hexadecimal digits), or evidence
    as JSON.

    Args:
        claims: file of the encoded claims of a quote or report; JSON has them.

    Raises:
        UsageError: claims are given twice.
        AttestationError: a file cannot be read, is too long, or is none of these.
    """
    data = read_limited(path, MAX_JSON)
    if data.lstrip().startswith(b"{"):
        if claims is not None:
            raise UsageError("--claims is for a quote; evidence as JSON has its own claims.")
        return Evidence.from_json(data)
    if len(data) in range(2 * REPORT_BYTES, 2 * REPORT_BYTES + 3):  # and the end of a line
        with suppress(ValueError):
            data = bytes.fromhex(data.decode())
    encoded = b"" if claims is None else read_limited(claims, MAX_CLAIMS)
    if len(data) == REPORT_BYTES:
        return Evidence(platform="sev-snp", quote=data, claims=encoded)
    try:
        platform, _ = platform_of(data)
    except AttestationError:
        raise AttestationError(
            f"{printable_path(path)} is not a quote of SGX or TDX, nor a report of SEV-SNP: it is "
            "cut short or of another kind."
        ) from None
    return Evidence(platform=platform, quote=data, claims=encoded)
