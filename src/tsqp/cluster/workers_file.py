"""Writes the file of workers that a TEE reads: one line for each, NAME ENDPOINT [KEY]."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from tsqp.wire.endpoint import parse_endpoint


def records(endpoints: Mapping[str, str], public_keys: Mapping[str, str]) -> str:
    """The lines of the file, in the order of `endpoints`.

    Args:
        endpoints: where each worker serves, by its name.
        public_keys: the workers' keys, by name; empty for links without encryption.

    Raises:
        WorkerUnavailable: an endpoint has no known form.
    """
    lines = []
    for name, endpoint in endpoints.items():
        fields = [name, str(parse_endpoint(endpoint))]
        if public_keys:
            fields.append(public_keys[name])
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


def replace(path: Path, text: str) -> None:
    """Write a file at once: a reader sees the old text or the new text, never a part of it.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("x", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
