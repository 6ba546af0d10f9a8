"""Memory at a fixed place, with real processes: for a session, for two at once, and by mistake."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from protocol_helpers import SHARED, SHM, Commands, Main, socket_endpoint, write_ids

from tsqp import LLM, SamplingParams

PROMPT = list(range(1, 31))
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"tsqp-{secrets.token_hex(8)}"
    yield name
    assert not (SHM / name).exists()


@pytest.fixture
def device(name: str) -> Iterator[Path]:
    """Memory that exists, as of an ivshmem device; a session takes what it needs of it."""
    path = SHM / f"ivshmem-{name}"
    path.write_bytes(bytes(2**23))
    yield path
    path.unlink()


def test_a_local_worker_shares_memory_by_name(name: str, commands: Commands) -> None:
    result = commands.run(
        "generate", "random:tiny", "--privacy", "pad", "--worker", "local", "--shm-name", name,
        "--prompt-ids", write_ids(commands.folder / "ids.json", PROMPT), "--json",
        "--max-tokens", 4,
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert result.json["transport"] == SHARED
    assert result.json["transport_reason"].endswith(f"bytes at {SHM / name}")


def test_of_two_sessions_at_one_device_one_uses_the_socket(
    device: Path, commands: Commands
) -> None:
    worker = commands.worker("random:tiny", "tcp://127.0.0.1:0", "--shm-name", device)
    options = {"worker": socket_endpoint(worker.stderr), "shm_name": str(device)}
    with (
        LLM("random:tiny", privacy="pad", **options) as first,
        LLM("random:tiny", privacy="pad", **options) as second,
        LLM("random:tiny", privacy="tee", fixed_point=True) as exact,
    ):
        assert (first.transport, second.transport) == (SHARED, "inline")
        assert second.transport_reason.endswith(f"{device}: another session uses it")
        answers = [llm.generate([PROMPT], GREEDY)[0].token_ids for llm in (first, second, exact)]
        assert answers[0] == answers[1] == answers[2]
    with LLM("random:tiny", privacy="pad", **options) as third:
        assert third.transport == SHARED


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shm-name", "tsqp", "--no-shm"], "contradict each other"),
        (["--shm-name", "other"], "begins with tsqp"),
        (["--shm-name", "relative/path"], "an absolute path"),
    ],
)
def test_a_place_that_cannot_be_is_a_usage_error(
    options: list[str], words: str, main: Main, ids: Path
) -> None:
    done = main(
        "generate", "random:tiny", "--privacy", "pad", "--worker", "local",
        "--prompt-ids", ids, *options,
    )  # fmt: skip
    assert done.status == 2
    assert words in done.error.replace("the absolute", "an absolute")


def test_shares_have_no_fixed_place(main: Main, ids: Path) -> None:
    done = main(
        "generate", "random:tiny", "--privacy", "shares", "--worker", "local", "--worker", "local",
        "--insecure-same-host", "--prompt-ids", ids, "--shm-name", "tsqp",
    )  # fmt: skip
    assert done.status == 2
    assert "several workers" in done.error


def test_the_doctor_says_when_the_place_is_not_used(name: str, commands: Commands) -> None:
    worker = commands.worker("random:tiny", "tcp://127.0.0.1:0", "--serve", "private")
    result = commands.run(
        "doctor", "random:tiny", "--worker", socket_endpoint(worker.stderr), "--shm-name", name
    )
    assert result.status == 1
    assert "in spite of --shm-name: the worker was started without --shm-name" in result.stdout
