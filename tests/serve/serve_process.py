"""A server in a process of its own."""

import re

from protocol_helpers import Commands, Running
from serve_client import KEY, OTHER_KEY, Server


def begin(commands: Commands, *arguments: object, **options: object) -> tuple[Running, Server]:
    """Start a server at a free port, and wait until it is ready."""
    env = {"TSQP_API_KEY": f"{KEY} {OTHER_KEY}"}
    running = commands.start("serve", *arguments, "--port", 0, "--threads", 1, env=env)
    running.says("serving ")
    found = re.search(r"listening at \w+://127\.0\.0\.1:(\d+)", running.stderr)
    assert found is not None
    return running, Server(int(found[1]), log=lambda: running.stderr)
