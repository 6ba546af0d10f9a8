"""Where a result was measured, without names that would tell whose machine it is."""

import datetime
import os
import platform
from pathlib import Path

import torch


def describe_machine(version: str) -> dict[str, str]:
    """Processor, versions and date.

    Args:
        version: version of tsqp.
    """
    return {
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "tsqp": version,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # some systems have none
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
