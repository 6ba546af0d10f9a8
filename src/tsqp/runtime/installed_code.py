"""Which code runs, as far as a process can tell of itself."""

import hashlib
import json
import platform
import sys
from importlib.metadata import distributions
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

SKIPPED = "__pycache__"  # byte code, which Python makes anew from these files when they change


def installed_code() -> dict[str, Any]:
    """The digest of our own files, Python, its flags, and the versions of all packages."""
    flags = {name: getattr(sys.flags, name) for name in type(sys.flags).__match_args__}
    return {
        "sha256": code_digest(files("tsqp")),
        "python": platform.python_version(),
        "python_flags": {name: int(value) for name, value in flags.items() if value},
        "packages": {
            each.name.lower().replace("_", "-"): each.version
            for each in distributions()
            if each.name is not None
        },
    }


def code_digest(package: Traversable) -> str:
    """SHA-256 over the names and contents of all files of a package, in hexadecimal digits.

    It is that of one line for each file, sorted by name: its SHA-256, and its name as JSON.
    """
    lines = sorted(
        (json.dumps(name), hashlib.sha256(file.read_bytes()).hexdigest())
        for name, file in _files(package, "")
    )
    return hashlib.sha256("\n".join(f"{sha} {name}" for name, sha in lines).encode()).hexdigest()


def _files(folder: Traversable, path: str) -> list[tuple[str, Traversable]]:
    found = []
    for each in folder.iterdir():
        if each.is_file():
            found.append((path + each.name, each))
        elif each.name != SKIPPED:
            found += _files(each, f"{path}{each.name}/")
    return found
