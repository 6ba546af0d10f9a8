"""One server for all tests here, in a process of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(TESTS / "protocol")]

from attested_server import AttestedServer, begin_attested  # noqa: E402
from protocol_helpers import Commands  # noqa: E402
from serve_client import KEY, Server  # noqa: E402
from serve_models import write_model  # noqa: E402
from serve_process import begin  # noqa: E402

if TYPE_CHECKING:
    from openai import OpenAI

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


@pytest.fixture(scope="session")
def server(serve_commands: Commands, model: Path) -> Server:
    """A server in mode tee, with two keys."""
    _, server = begin(
        serve_commands, model, "--privacy", "tee", "--served-model-name", NAME,
        "--served-model-name", "alias", "--max-num-seqs", 8, "--max-num-queued-reqs", 24,
    )  # fmt: skip
    return server


@pytest.fixture(scope="module")
def client(server: Server) -> "Iterator[OpenAI]":
    """OpenAI's own client of the shared server."""
    from openai import OpenAI

    url = f"http://127.0.0.1:{server.port}/v1"
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Runs commands; what they started must be gone at the end."""
    commands = Commands(tmp_path)
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()


@pytest.fixture(scope="session")
def watched_server(serve_commands: Commands, model: Path) -> Server:
    """A server in mode pad, which shows what its worker receives, and logs all it can."""
    calls = serve_commands.folder / "calls.jsonl"
    _, server = begin(
        serve_commands, model, "--privacy", "pad", "--worker", "local", "--pad-memory", 0.01,
        "--served-model-name", NAME, "--show-worker-view", "--debug", "--rpc-log", calls,
    )  # fmt: skip
    return server


@pytest.fixture(scope="session")
def attested_server(serve_commands: Commands, model: Path) -> AttestedServer:
    """A server on the simulated platform, which signs receipts."""
    return begin_attested(
        serve_commands, model, "--privacy", "tee", "--served-model-name", NAME, "--receipts",
        "--attest", "simulated",
    )  # fmt: skip
