"""One server for all tests here, in a process of its own."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(TESTS / "protocol")]

from protocol_helpers import Commands, Running  # noqa: E402
from serve_client import KEY, OTHER_KEY, Server  # noqa: E402
from serve_models import write_model  # noqa: E402

NAME = "tiny"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="session")
def serve_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """For the server that all tests share; nothing may be left of it."""
    commands = Commands(tmp_path_factory.mktemp("serve"))
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()


def begin(commands: Commands, *arguments: object, **options: object) -> tuple[Running, Server]:
    """Start a server at a free port, and wait until it is ready."""
    env = {"TSQP_API_KEY": f"{KEY} {OTHER_KEY}"}
    running = commands.start("serve", *arguments, "--port", 0, "--threads", 1, env=env)
    running.says("serving ")
    found = re.search(r"listening at \w+://127\.0\.0\.1:(\d+)", running.stderr)
    assert found is not None
    return running, Server(int(found[1]), log=lambda: running.stderr)


@pytest.fixture(scope="session")
def server(serve_commands: Commands, model: Path) -> Server:
    """A server in mode tee, with two keys."""
    _, server = begin(
        serve_commands, model, "--privacy", "tee", "--served-model-name", NAME,
        "--served-model-name", "alias", "--max-num-seqs", 8, "--max-num-queued-reqs", 8,
    )  # fmt: skip
    return server


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Runs commands; what they started must be gone at the end."""
    commands = Commands(tmp_path)
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()
