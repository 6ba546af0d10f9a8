"""A worker process: where it listens, how it ends, and what it frees."""

import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
from protocol_helpers import (
    GIVES_UP_SOON,
    START_S,
    Commands,
    Main,
    eventually,
    mapped_segments,
    socket_endpoint,
    write_ids,
)

from tsqp import LLM, SamplingParams
from tsqp.errors import HandshakeError, WorkerUnavailable
from tsqp.runtime.local_worker import LocalWorker

ENDLESS = ["--ignore-eos", "--max-tokens", "50000", "--temperature", "1", "--seed", "1"]
TCP = "tcp://127.0.0.1:0"


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_an_address_in_use_is_refused(kind: str, commands: Commands) -> None:
    first = commands.worker("random:tiny", commands.ipc() if kind == "ipc" else TCP)
    endpoint = socket_endpoint(first.stderr)
    error = commands.fails("worker", "random:tiny", "--listen", endpoint)
    assert f"Cannot listen on {endpoint}" in error
    assert first.is_alive


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "192.0.2.1", "example.org"])
def test_an_address_that_others_can_reach_needs_insecure(host: str, main: Main) -> None:
    # The model is refused too, but later: a worker that did not look would not serve for ever.
    result = main("worker", "no-such-model", "--listen", f"tcp://{host}:0")
    assert result.status == 2
    assert "pass --insecure" in result.error


def test_with_insecure_on_both_sides_an_open_link_is_used(
    commands: Commands, main: Main, ids: Path
) -> None:
    worker = commands.worker("random:tiny", "tcp://0.0.0.0:0", "--insecure")
    command = [
        "generate", "random:tiny", "--privacy", "open", "--prompt-ids", ids,
        "--worker", socket_endpoint(worker.stderr),
    ]  # fmt: skip
    assert main(*command).status == 2
    assert main(*command, "--insecure").status == 0


@pytest.mark.parametrize("listen", ["inproc", "local", "nowhere", "ipc://"])
def test_a_worker_does_not_listen_on(listen: str, main: Main) -> None:
    result = main("worker", "random:tiny", "--listen", listen)
    assert result.status in (1, 2)
    assert "ipc:///PATH" in result.error


def test_a_socket_path_without_folder_is_named(commands: Commands) -> None:
    error = commands.fails("worker", "random:tiny", "--listen", "ipc:///no/such/folder/sock")
    assert "there is no folder /no/such/folder" in error


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:999"])
def test_a_device_that_is_not_here_is_named(device: str, main: Main) -> None:
    result = main("worker", "random:tiny", "--listen", "ipc:///unused", "--device", device)
    assert result.status == 2
    assert ("no such device" if device != "cuda:999" else "torch sees") in result.error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_worker_with_status_zero(
    number: signal.Signals, commands: Commands
) -> None:
    worker = commands.worker("random:tiny", commands.ipc())
    worker.send(number)
    result = worker.ends()
    assert result.status == 0
    assert "Traceback" not in result.stderr
    assert eventually(lambda: not commands.leftovers())


def test_a_signal_ends_a_loading_worker_with_status_zero(commands: Commands) -> None:
    worker = commands.start(
        "worker", "random:llama-3.2-1b", "--listen", commands.ipc(), "--dtype", "bfloat16"
    )
    worker.says("loading ")
    worker.send(signal.SIGTERM)
    result = worker.ends()
    assert result.status == 0
    assert "serving" not in result.stderr
    assert eventually(lambda: not commands.leftovers())


def test_a_signal_ends_a_busy_worker_and_its_client_sees_it(
    commands: Commands, speaking: Path
) -> None:
    worker = commands.worker(speaking, commands.ipc())
    generate = commands.start(
        "generate", speaking, "--privacy", "open", "--worker", commands.ipc(),
        "--prompt", "Once upon a time", *ENDLESS, env=GIVES_UP_SOON,
    ).answers()  # fmt: skip
    worker.send(signal.SIGTERM)
    assert worker.ends().status == 0
    result = generate.ends()
    assert result.status == 1
    assert "is gone" in result.error


def test_the_session_of_a_killed_client_is_freed(commands: Commands, speaking: Path) -> None:
    worker = commands.worker(speaking, commands.ipc())
    generate = commands.start(
        "generate", speaking, "--privacy", "open", "--worker", commands.ipc(),
        "--prompt", "Once upon a time", *ENDLESS,
    ).answers()  # fmt: skip
    assert "session opened, 1 now" in worker.stderr
    assert mapped_segments(worker.pid) > 0
    generate.send(signal.SIGKILL)
    worker.says("session ended (the client left), 0 left", 10)
    assert eventually(lambda: mapped_segments(worker.pid) == 0)
    assert worker.is_alive


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_local_worker_ends_with_its_parent(
    number: signal.Signals, commands: Commands, speaking: Path
) -> None:
    generate = commands.start(
        "generate", speaking, "--privacy", "open", "--worker", "local",
        "--prompt", "Once upon a time", *ENDLESS,
    ).answers()  # fmt: skip
    assert len(commands.processes()) == 2
    generate.send(number)
    result = generate.ends()
    assert result.status != 0
    assert "Traceback" not in result.stderr
    assert eventually(lambda: not commands.processes())


def test_a_local_worker_that_loads_ends_with_its_parent(commands: Commands) -> None:
    ids = write_ids(commands.folder / "ids.json", [1])
    generate = commands.start(
        "generate", "random:llama-3.2-1b", "--privacy", "open", "--worker", "local",
        "--dtype", "bfloat16", "--prompt-ids", ids,
    ).says("starting a worker")  # fmt: skip
    assert eventually(lambda: len(commands.processes()) == 2, START_S)
    generate.send(signal.SIGKILL)
    assert eventually(lambda: not commands.processes(), START_S)


def test_a_worker_keeps_away_from_the_files_of_others(commands: Commands) -> None:
    path = commands.folder / "worker.sock"
    path.write_text("precious")
    error = commands.fails("worker", "random:tiny", "--listen", commands.ipc())
    assert "that is not a socket" in error
    assert path.read_text() == "precious"


def test_only_this_user_may_use_the_socket_file(commands: Commands) -> None:
    commands.worker("random:tiny", commands.ipc())
    path = commands.folder / "worker.sock"
    assert path.is_socket()
    assert path.stat().st_mode & 0o077 == 0


def test_a_user_may_have_as_many_sessions_as_the_worker_was_told(commands: Commands) -> None:
    endpoint = commands.ipc()
    commands.worker("random:tiny", endpoint, "--max-sessions-per-client", 1)
    with LLM("random:tiny", worker=endpoint) as llm:
        with pytest.raises(HandshakeError, match="has 1 sessions with this user or address"):
            LLM("random:tiny", worker=endpoint)
        assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))


def test_a_stranger_on_the_port_does_not_end_a_worker(commands: Commands) -> None:
    worker = commands.worker("random:tiny", TCP)
    host, port = socket_endpoint(worker.stderr).removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    ids = write_ids(commands.folder / "ids.json", [1])
    result = commands.run(
        "generate", "random:tiny", "--privacy", "open", "--prompt-ids", ids,
        "--worker", f"tcp://{host}:{port}",
    )  # fmt: skip
    assert result.status == 0
    assert psutil.Process(worker.pid).is_running()


def test_a_worker_needs_only_the_prepared_file(
    commands: Commands, main: Main, speaking: Path, ids: Path
) -> None:
    prepared = commands.folder / "small.tsqp.safetensors"
    command = ["generate", speaking, "--prompt-ids", ids, "--max-tokens", 8, "--json"]
    expected = main(*command, "--privacy", "tee", "--fixed-point")
    assert main("prepare", speaking, prepared).status == 0
    worker = commands.worker(str(prepared), commands.ipc())
    endpoint = socket_endpoint(worker.stderr)
    assert main(*command, "--worker", endpoint).token_ids == expected.token_ids
    refused = main(*command, "--worker", endpoint, "--privacy", "open")
    assert "the worker serves private modes only" in refused.error


def test_a_prepared_file_that_was_changed_is_refused(
    commands: Commands, main: Main, speaking: Path
) -> None:
    prepared = commands.folder / "small.tsqp.safetensors"
    assert main("prepare", speaking, prepared).status == 0
    with prepared.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    result = main("worker", prepared, "--listen", commands.ipc())
    assert result.status == 1
    assert "was changed after it was written, or is damaged" in result.error


def test_a_prepared_file_is_no_model_for_the_tee(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "small.tsqp.safetensors"
    path.touch()
    result = main("generate", path, "--privacy", "tee", "--prompt", "hi")
    assert result.status == 1
    assert "which only a worker of the private modes can use" in result.error


def test_a_local_worker_inherits_nothing_that_may_be_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = tmp_path / "python"  # stands for the worker, and writes down what it was given
    executable.write_text(f"#!/bin/sh\ntr '\\0' '\\n' < /proc/self/environ > {tmp_path}/environ\n")
    executable.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(executable))
    secrets = ("TSQP_GENERATE_PROMPT", "TSQP_KEYFILE", "HF_TOKEN", "API_KEY", "PROMPT", "LLAMA_X")
    dangerous = ("LD_PRELOAD_X", "PYTHONSTARTUP", "PYTHONINSPECT", "NUMBA_DISABLE_JIT")
    needed = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TSQP_CACHE", "LC_ALL", "PYTHONPATH")
    for name in (*secrets, *dangerous, *needed):
        monkeypatch.setenv(name, "zyzzyva")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    worker = LocalWorker(["random:tiny"])
    with pytest.raises(WorkerUnavailable):
        worker.await_ready()
    worker.close()
    given = dict(
        line.split("=", 1) for line in (tmp_path / "environ").read_text().splitlines() if line
    )
    assert {name for name, value in given.items() if value == "zyzzyva"} == set(needed)
    assert "PATH" in given
