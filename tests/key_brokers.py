"""A key broker in a process of its own."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from certificates import write_certificate

if TYPE_CHECKING:
    from protocol_helpers import Commands

SECRET = bytes(range(256))
SIMULATED = 'platforms = ["sgx"]\nany_measurement = true\nallow_simulated = true\n'


def start_broker(commands: "Commands", folder: Path, policy: str, **files: Path) -> tuple[str, str]:
    """A broker with these secrets and `SECRET`; returns its URL and the hash of its key."""
    certfile, keyfile = write_certificate(folder)
    (folder / "policy.toml").write_text(policy)
    (folder / "secret").write_bytes(SECRET)
    secrets = {"weights": folder / "secret", **files}
    running = commands.start(
        "keys", "serve", "--policy", folder / "policy.toml",
        *(word for name, path in secrets.items() for word in ("--secret", f"{name}={path}")),
        "--ssl-certfile", certfile, "--ssl-keyfile", keyfile, "--port", 0,
    )  # fmt: skip
    running.says("--broker-key ")
    found = re.search(r"(https://\S+); --broker-key (\w+)", running.stderr)
    assert found is not None
    assert ("ANYBODY" in running.stderr) == ("allow_simulated" in policy)
    return found[1], found[2]
