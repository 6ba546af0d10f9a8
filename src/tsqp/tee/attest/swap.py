"""Memory of a confidential virtual machine that its kernel writes to a disk.

The machine's memory is encrypted, but its disks belong to the host, and swap is written there in
clear. Swap in compressed memory (zram) does not leave the machine.
"""

from pathlib import Path

from tsqp.errors import AttestationError

SWAPS = Path("/proc/swaps")


def refuse_swap(swaps: Path = SWAPS) -> None:
    """Check that the kernel swaps to no disk.

    Args:
        swaps: the kernel's table: a heading, then one line for each place.

    Raises:
        AttestationError: it does, or the table cannot be read.
    """
    try:
        lines = swaps.read_bytes().splitlines()[1:]
    except FileNotFoundError:  # a kernel without swap
        return
    except OSError as error:
        raise AttestationError(f"{swaps} cannot be read: {error.strerror}.") from None
    if any(not line.startswith(b"/dev/zram") for line in lines):
        raise AttestationError(
            "The machine swaps to a disk, which its host can read: switch swap off before the "
            "server starts (swapoff -a)."
        )
