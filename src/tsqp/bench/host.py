"""Describes the machine on which a result was measured."""

import subprocess
from pathlib import Path

from tsqp import __version__
from tsqp.runtime import machine


def describe_machine() -> dict[str, str]:
    """Processor, versions, date and commit."""
    return machine.describe_machine(__version__) | {"commit": _commit()}


def _commit() -> str:
    """The git commit of this package's checkout, marked if files have changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return "unknown"
    return found.stdout.strip()
