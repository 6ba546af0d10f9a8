"""Fetches Intel's collateral for a quote, when a user asks for it. Verifying fetches nothing.

The service that gives it is not trusted: everything is signed by Intel, and is checked when a quote
is verified. A service could give old collateral, which is valid for 30 days.
"""

import asyncio
import secrets
from pathlib import Path

import dcap_qvl

from tsqp.api.evidence import Evidence
from tsqp.client.collateral import MAX_FILE, IntelCollateral
from tsqp.client.dcap import platform_of
from tsqp.client.text import printable
from tsqp.errors import AttestationError, UsageError, printable_path

TOTAL_S = 60.0


def fetch_collateral(evidence: Evidence, pccs: str, total_s: float = TOTAL_S) -> IntelCollateral:
    """The collateral for the processor that a quote says it is of. It is not verified yet.

    Args:
        pccs: URL of Intel's service, or of a cache of it (PCCS).
        total_s: seconds after which to give up.

    Raises:
        UsageError: the URL is none, or the evidence is not of SGX or TDX.
        AttestationError: the quote cannot be read; or the service cannot be reached, is too slow,
            or gives something else.
    """
    if not pccs.startswith(("https://", "http://")):
        raise UsageError("--pccs must be https://HOST, or http://HOST.")
    if evidence.platform not in ("sgx", "tdx"):
        raise UsageError("Only quotes of SGX and TDX need Intel's collateral.")
    wanted = platform_of(evidence.quote)
    text = asyncio.run(_fetch(pccs, evidence.quote, total_s))
    if len(text) > MAX_FILE:
        raise AttestationError(f"The collateral has more than {MAX_FILE:,} bytes.")
    try:
        found = IntelCollateral.parse(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AttestationError("The service gave something else than collateral.") from None
    if (found.platform, found.fmspc) != (wanted[0], wanted[1].upper()):
        raise AttestationError("The service gave collateral of other processors than the quote's.")
    return found


def write_collateral(collateral: IntelCollateral, path: Path) -> None:
    """Write a file for --collateral, in the place of an earlier one.

    Raises:
        UsageError: the name has another ending, or the file cannot be written.
    """
    if path.suffix != ".json":
        raise UsageError("--out must end in .json, as collateral of Intel does.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(collateral.text)
        temporary.replace(path)  # a proxy may read it at any time
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"Cannot write {printable_path(path)}: {exc.strerror}.") from None


async def _fetch(pccs: str, quote: bytes, total_s: float) -> str:
    try:
        async with asyncio.timeout(total_s):
            found = await dcap_qvl.get_collateral(pccs.rstrip("/"), quote)
    except TimeoutError:
        raise AttestationError(
            f"The service gave no collateral within {total_s:g} seconds."
        ) from None
    except (ValueError, RuntimeError) as exc:
        reason = printable(str(exc)).removeprefix("Failed to get collateral: ").rstrip(".")
        raise AttestationError(f"Collateral cannot be fetched: {reason}.") from None
    return str(found.to_json())
