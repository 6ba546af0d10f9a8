"""Where a result was measured, without names that would tell whose machine it is."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch


def describe_machine(version: str) -> dict[str, str]:
    """Processor, versions, commit and date.

    Args:
        version: of tsqp.
    """
    return {
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "tsqp": version,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # some systems have none
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """The commit of the checkout that this package lies in, marked where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return "unknown"
    return found.stdout.strip()
