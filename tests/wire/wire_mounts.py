"""Running a program that finds a file system of given options in one place."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o "$3" none "$0" && exec "$1" -c "$2"'


def run_in_a_mount(folder: Path, options: str, program: str) -> str:
    """What `program` prints where `folder` is a tmpfs; skips where nothing may be mounted."""
    try:
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=10).returncode:
            pytest.skip("this user may not mount file systems")
    except FileNotFoundError:
        pytest.skip("there is no unshare command here")
    arguments = [str(folder), sys.executable, textwrap.dedent(program), options]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", MOUNT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "mount:" in done.stderr:
        pytest.skip("this user may not mount file systems")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
