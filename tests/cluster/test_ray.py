"""`tsqp cluster` with a real Ray cluster of this machine, real actors and real workers."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from tsqp import LLM, AsyncLLM, SamplingParams
from tsqp.model.shard import Shard
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.keys import write_key_pair
from tsqp.wire.query_worker import ask_what_is_served

RAY = Path(sys.executable).with_name("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RAY.exists(), reason="Ray is not installed: scripts/setup dev,ray"),
]
NAMES = [f"shard{shard}-replica{replica}" for shard in (1, 2) for replica in (1, 2)]
PATIENCE_S = 120.0
PROMPT = [5, 6, 7, 8]


@dataclass(frozen=True, slots=True)
class Place:
    """A Ray cluster, a folder of keys, and the file of workers that `up` keeps right."""

    address: str
    folder: Path
    environment: dict[str, str]

    @property
    def file(self) -> Path:
        return self.folder / "workers"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "tsqp", "cluster", *words, "--address", self.address]

    def up(self, *more: str) -> list[str]:
        keys = str(self.folder / "keys")
        model = ["random:tiny", "--shards", "2", "--replicas", "2", "--keys", keys]
        return self.command("up", *model, "--threads", "1", *more)

    def run(self, command: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
        env = self.environment | variables
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)

    def records(self) -> dict[str, tuple[str, str]]:
        lines = [line.split(" ") for line in self.file.read_text().splitlines()]
        return {name: (endpoint, key) for name, endpoint, key in lines}

    def worker_processes(self) -> dict[str, psutil.Process]:
        """The processes with a secret key of this folder, by the name of their key's folder."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            for word in words:
                if word.startswith(f"{self.folder}/keys/"):
                    found[Path(word).parent.name] = process
        return found


def until(wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="tsqp-"))  # short: Ray has sockets in it
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    for name in NAMES:
        write_key_pair(folder / "keys" / name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
    options += ["--num-cpus=5", "--num-gpus=0", "--object-store-memory=80000000", "--block"]
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment = dict(os.environ) | variables
    command = [str(RAY), "start", "--head", "--disable-usage-stats", f"--temp-dir={folder}/ray"]
    started = subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        place = Place(f"127.0.0.1:{port}", folder, environment)
        until(
            lambda: started.poll() is not None or place.run(place.command("down")).returncode == 0
        )
        assert started.poll() is None
        yield place
    finally:
        children = psutil.Process(started.pid).children(recursive=True)
        end(started)
        _, alive = psutil.wait_procs(children, timeout=30)
        for child in alive:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def watcher(place: Place) -> Iterator["subprocess.Popen[bytes]"]:
    """`tsqp cluster up --workers-file`, which has written the file."""
    command = place.up("--workers-file", str(place.file))
    with (place.folder / "said").open("wb") as said:
        started = subprocess.Popen(command, env=place.environment, stderr=said)
    try:
        until(lambda: started.poll() is not None or place.file.exists())
        assert started.poll() is None, (place.folder / "said").read_text()
        yield started
    finally:
        end(started)
        place.run(place.command("down"))


@pytest.mark.usefixtures("watcher")
def test_the_file_names_a_worker_for_each_part_and_replica(place: Place) -> None:
    found = place.records()
    assert [*found] == NAMES
    for name, (endpoint, key) in found.items():
        assert key in (place.folder / "keys" / name / "worker.pub").read_text()
        served = ask_what_is_served(parse_endpoint(endpoint), key, "int8", timeout=30)
        assert served.shard == Shard(int(name[5]), 2)


@pytest.mark.usefixtures("watcher")
def test_all_workers_together_give_the_tokens_of_the_model(place: Place) -> None:
    ids = place.folder / "ids"
    ids.write_text("[5, 6, 7, 8]")
    common = ["random:tiny", "--prompt-ids", str(ids), "--max-tokens", "8", "--temperature", "0"]
    command = [sys.executable, "-m", "tsqp", "generate", *common, "--threads", "1", "--json"]
    found = place.records()
    links: list[str] = []
    for name in ("shard1-replica2", "shard2-replica1"):
        links += ["--worker", found[name][0], "--worker-key", found[name][1]]
    done = [
        place.run([*command, "--privacy", "pad", *links]),
        place.run([*command, "--privacy", "tee", "--fixed-point"]),
    ]
    tokens = [json.loads(each.stdout)["outputs"][0]["token_ids"] for each in done]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 8


@pytest.mark.usefixtures("watcher")
@pytest.mark.parametrize("victim", ["worker", "actor"])
def test_a_killed_worker_comes_back_and_only_its_line_changes(place: Place, victim: str) -> None:
    before = place.records()
    name = "shard2-replica1"
    process = place.worker_processes()[name]
    if victim == "actor":
        parent = process.parent()
        assert parent is not None
        process = parent
    began = time.monotonic()
    process.send_signal(signal.SIGKILL)
    until(lambda: place.records() != before)

    print(f"a killed {victim} was back after {time.monotonic() - began:.1f} s")
    after = place.records()
    endpoint, key = after.pop(name)
    old, same_key = before.pop(name)
    assert after == before and key == same_key and endpoint != old
    served = ask_what_is_served(parse_endpoint(endpoint), key, "int8", timeout=30)
    assert served.shard == Shard(2, 2)


async def stream(llm: AsyncLLM, expected: list[int], stop: asyncio.Event) -> tuple[int, float]:
    """One request after the other; the number of right answers, and the longest wait for a token.

    A request that is lost raises.
    """
    params = SamplingParams(max_tokens=len(expected), temperature=0, ignore_eos=True)
    right, longest_s, last = 0, 0.0, time.monotonic()
    while not stop.is_set():
        found: list[int] = []
        async for output in llm.add(PROMPT, params):
            now = time.monotonic()
            longest_s, last = max(longest_s, now - last), now
            found += output.token_ids
        assert found == expected
        right += 1
    return right, longest_s


async def whether_all_serve(llm: AsyncLLM, wanted: bool) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while all(each.state == "in use" for each in llm.workers) != wanted:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.mark.usefixtures("watcher")
def test_streams_lose_nothing_when_a_worker_is_killed_under_load(place: Place) -> None:
    with LLM("random:tiny", privacy="tee", fixed_point=True, threads=1) as llm:
        params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
        expected = list(llm.generate([PROMPT], params)[0].token_ids)

    async def run() -> None:
        stop = asyncio.Event()
        given = {"workers_file": place.file, "threads": 1, "pad_memory": 2**24}
        llm = await asyncio.to_thread(partial(AsyncLLM, "random:tiny", **given))
        async with llm:
            await whether_all_serve(llm, True)
            streams = [asyncio.create_task(stream(llm, expected, stop)) for _ in range(8)]
            for name in ("shard1-replica1", "shard2-replica2"):
                await asyncio.sleep(2.0)
                place.worker_processes()[name].send_signal(signal.SIGKILL)
                killed = time.monotonic()
                await whether_all_serve(llm, False)
                await whether_all_serve(llm, True)
                back_s = time.monotonic() - killed
                print(f"{name}: all workers were used again {back_s:.1f} s after it was killed")
            stop.set()
            done = await asyncio.gather(*streams)
            assert llm.reconnects == 0  # no session ended: the replicas took the calls
        answers, longest_s = sum(right for right, _ in done), max(each for _, each in done)
        assert answers > 8
        print(f"{answers} answers, none lost or wrong; the longest wait was {longest_s:.2f} s")

    asyncio.run(run())


@pytest.mark.usefixtures("watcher")
def test_status_shows_what_the_file_has(place: Place) -> None:
    done = place.run(place.command("status", "--json"))
    workers = json.loads(done.stdout)["workers"]
    expected = {name: endpoint for name, (endpoint, _) in place.records().items()}
    assert {name: each["endpoint"] for name, each in workers.items()} == expected
    assert done.returncode == 0


@pytest.mark.usefixtures("watcher")
def test_up_takes_over_workers_that_run_and_refuses_other_ones(place: Place) -> None:
    again = place.run(place.up())
    assert again.stdout == place.file.read_text()
    other = place.run(place.up("--serve", "all"))
    assert other.returncode == 2 and "runs already" in other.stderr
    assert place.run(place.command("status")).returncode == 0


def test_a_worker_that_cannot_start_ends_up_and_leaves_nothing(place: Place) -> None:
    wrong = place.command("up", "random:none", "--insecure", "--name", "wrong")
    done = place.run(wrong)
    assert done.returncode == 1 and "shard1-replica1 on " in done.stderr
    status = place.run(place.command("status", "--name", "wrong"))
    assert (status.returncode, status.stdout) == (1, "no workers\n")


def test_another_token_is_refused(place: Place) -> None:
    done = place.run(place.command("status"), RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert done.returncode == 1 and "token" in done.stderr.splitlines()[-1]


def test_down_leaves_no_process_and_ends_the_watcher(
    place: Place, watcher: "subprocess.Popen[bytes]"
) -> None:
    assert set(place.worker_processes()) == set(NAMES)
    assert place.run(place.command("down")).returncode == 0
    assert place.worker_processes() == {}
    assert watcher.wait(PATIENCE_S) == 1
    assert "tsqp cluster down" in (place.folder / "said").read_text().splitlines()[-1]
    assert place.run(place.command("status")).returncode == 1
