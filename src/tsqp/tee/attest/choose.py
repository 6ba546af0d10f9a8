"""Which platform gives evidence."""

from pathlib import Path

from tsqp.errors import AttestationError
from tsqp.tee.attest.configfs import REPORTS, ConfigfsTsm
from tsqp.tee.attest.gramine import DEVICE, Gramine
from tsqp.tee.attest.provider import AUTO, SIMULATED, Provider
from tsqp.tee.attest.simulated import Simulated
from tsqp.tee.attest.swap import SWAPS, refuse_swap


def choose_provider(
    choice: str, *, device: Path = DEVICE, reports: Path = REPORTS, swaps: Path = SWAPS
) -> Provider:
    """The platform that this process runs on, or the simulated one if `choice` says so.

    Args:
        choice: "auto" or "simulated".
        device, reports: where Gramine and Linux answer.
        swaps: see `refuse_swap`.

    Raises:
        AttestationError: the platform gives no evidence, or it is a virtual machine that swaps.
    """
    if choice == SIMULATED:
        return Simulated()
    assert choice == AUTO
    if device.is_dir():
        return Gramine(device)
    if reports.is_dir():
        refuse_swap(swaps)
        return ConfigfsTsm(reports)
    raise AttestationError(
        f"This platform gives no evidence: there is neither {device} (Gramine on SGX) nor "
        f"{reports} (TDX or SEV-SNP with Linux 6.7 or newer, configfs mounted, and the module "
        "tdx_guest or sev-guest loaded); start without --attest, or try it out with --attest "
        "simulated."
    )
