"""Where shared memory cannot be had, the tensors go through the socket, and everybody says why."""

import os
import subprocess
from collections.abc import Sequence
from functools import cache

import pytest
from protocol_helpers import SHARED, Commands, Result, Running, write_ids

from tsqp import LLM, SamplingParams

PROMPT = list(range(1, 301))
MISSING = """
mkdir dev && mount -t tmpfs tmpfs dev &&
for name in null zero random urandom; do
    touch dev/$name && mount --bind /dev/$name dev/$name
done && mount --rbind dev /dev"""
READ_ONLY = "mount -t tmpfs -o ro tmpfs /dev/shm"
FULL = """
mount -t tmpfs -o size=4m tmpfs /dev/shm && ! head -c 8388608 /dev/zero 2>&- > /dev/shm/full"""


UNSEEN = "the worker's sealed memory cannot be opened by this process (No such file or directory)"


def tmpfs(size: str) -> str:
    return f"mount -t tmpfs -o size={size} tmpfs /dev/shm"


def inside(setup: str) -> list[str]:
    """Runs a command where /dev/shm is as `setup` makes it, for it and its children alone."""
    return ["unshare", "--mount", "sh", "-c", f'{{ {setup}\n}} && exec "$@"', "sh"]


@cache
def may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with LLM("random:tiny", privacy="tee") as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        return list(llm.generate([PROMPT], params)[0].token_ids)


def hidden(worker: Running, commands: Commands, and_more: str = "true") -> list[str]:
    """Runs a command that does not see what the worker has open, so memory needs a name."""
    empty = commands.folder / "empty"
    empty.mkdir()
    return inside(f"mount --bind {empty} /proc/{worker.pid}/fd && {and_more}")


def start_worker(commands: Commands, before: Sequence[str] = ()) -> Running:
    arguments = ("worker", "random:tiny", "--listen", commands.ipc())
    return commands.start(*arguments, before=before).says("serving ")


def run(commands: Commands, *arguments: object, before: list[str]) -> Result:
    ids = write_ids(commands.folder / "ids.json", PROMPT)
    result = commands.run(
        "generate", "random:tiny", "--privacy", "open", "--prompt-ids", ids, "--max-tokens", 8,
        "--json", *arguments,
        before=before,
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert f"transport {result.json['transport']} ({result.json['transport_reason']})" in (
        result.stderr
    )
    return result


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (MISSING, "the worker has no segment in /dev/shm: No such file or directory"),
        pytest.param(
            READ_ONLY,
            "the worker has no segment in /dev/shm: Read-only file system",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            FULL,
            "the worker has no segment in /dev/shm: it would have 0 bytes, and 262144",
            marks=pytest.mark.slow,
        ),
        (tmpfs("256k"), "the worker has no segment in /dev/shm: it would have 131072 bytes"),
    ],
    ids=["missing", "read-only", "full", "small"],
)
def test_without_room_in_shared_memory_tensors_go_inline(
    setup: str, reason: str, commands: Commands, expected: list[int]
) -> None:
    worker = start_worker(commands, inside(setup))
    result = run(commands, "--worker", commands.ipc(), before=hidden(worker, commands))
    assert result.json["transport"] == "inline"
    assert reason in result.json["transport_reason"]
    assert UNSEEN in result.json["transport_reason"]
    assert result.token_ids == [expected]


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_sealed_memory_needs_no_room_in_dev_shm(commands: Commands, expected: list[int]) -> None:
    result = run(commands, "--worker", "local", before=inside(MISSING))
    assert result.json["transport"] == SHARED
    assert "of sealed memory" in result.json["transport_reason"]
    assert result.token_ids == [expected]


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_worker_among_other_processes_shares_memory_by_its_name(
    commands: Commands, expected: list[int], tiny_worker: str
) -> None:
    before = ["unshare", "--pid", "--fork", "--mount-proc"]
    result = run(commands, "--worker", tiny_worker, before=before)
    assert result.json["transport"] == SHARED
    assert f"bytes in /dev/shm; {UNSEEN}" in result.json["transport_reason"]
    assert result.token_ids == [expected]


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_call_larger_than_shared_memory_is_split(commands: Commands, expected: list[int]) -> None:
    worker = start_worker(commands, inside(tmpfs("600k")))
    beside = ["nsenter", f"--mount=/proc/{worker.pid}/ns/mnt"]
    before = [*beside, *hidden(worker, commands)]
    result = run(commands, "--worker", commands.ipc(), before=before)
    assert result.json["transport"] == SHARED
    assert result.json["rpc"]["calls"] > (1 + 2 * 4 + 1) * 8
    assert result.token_ids == [expected]


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_worker_in_another_mount_namespace_goes_inline(
    commands: Commands, expected: list[int]
) -> None:
    worker = start_worker(commands)
    before = hidden(worker, commands, tmpfs("64m"))
    result = run(commands, "--worker", commands.ipc(), before=before)
    assert result.json["transport"] == "inline"
    assert "the worker's segment is not in this side's /dev/shm" in result.json["transport_reason"]
    assert result.token_ids == [expected]


@pytest.mark.skipif(os.geteuid() == 0 and not may_mount(), reason="needs a user without rights")
@pytest.mark.slow
def test_shared_memory_without_permission_goes_inline(
    commands: Commands, expected: list[int]
) -> None:
    # Root may write anywhere: it first becomes nobody in particular about files.
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    forbid = "mount -t tmpfs -o mode=0555,uid=65534 tmpfs /dev/shm"
    worker = start_worker(commands, [*inside(forbid), *drop])
    result = run(commands, "--worker", commands.ipc(), before=hidden(worker, commands))
    assert result.json["transport"] == "inline"
    assert "/dev/shm: Permission denied" in result.json["transport_reason"]
    assert result.token_ids == [expected]


def test_a_client_may_refuse_shared_memory(
    commands: Commands, expected: list[int], tiny_worker: str
) -> None:
    result = run(commands, "--worker", tiny_worker, "--no-shm", before=[])
    assert result.json["transport"] == "inline"
    assert result.json["transport_reason"] == "--no-shm was given"
    assert result.json["rpc"]["socket_bytes"] > result.json["rpc"]["sent_bytes"]
    assert result.token_ids == [expected]


def test_a_worker_may_refuse_shared_memory(commands: Commands, expected: list[int]) -> None:
    commands.worker("random:tiny", commands.ipc(), "--no-shm")
    result = run(commands, "--worker", commands.ipc(), before=[])
    assert result.json["transport"] == "inline"
    assert result.json["transport_reason"] == "the worker was started with --no-shm"
    assert result.token_ids == [expected]
