"""A worker that is absent, lost, silent or different: one sentence, soon, and nothing left."""

import re
import secrets
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_workers import deaf_socket, fake_worker, newer_version, silence, silence_after_welcome
from protocol_helpers import (
    DEADLINE_S,
    GIVES_UP_SOON,
    START_S,
    Commands,
    Running,
    socket_endpoint,
    write_ids,
)

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.weights import parse_dtype
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Hello

TCP = "tcp://127.0.0.1:0"
LONG = ["--ignore-eos", "--max-tokens", "50000", "--temperature", "1", "--seed", "1"]
CONNECTING = "privacy open"  # said at the beginning
CONNECTED = "worker at "


def generate(commands: Commands, model: object, endpoint: str, *arguments: object) -> Running:
    command = ["generate", model, "--privacy", "open", "--worker", endpoint, *arguments]
    return commands.start(*command, env=GIVES_UP_SOON)


def error(running: Running, after: str = "") -> str:
    """The error of a command that fails soon after it said something."""
    result = running.says(after).ends(DEADLINE_S)
    assert result.status == 1
    return result.error


def test_no_worker_at_the_endpoint_is_an_error_that_says_how_to_start_one(
    commands: Commands, ids: Path
) -> None:
    endpoints = [commands.ipc(), "tcp://127.0.0.1:9"]
    running = [generate(commands, "random:tiny", each, "--prompt-ids", ids) for each in endpoints]
    for endpoint, each in zip(endpoints, running, strict=True):
        sentence = error(each, CONNECTING)
        assert f"No worker answers at {endpoint}" in sentence
        assert f"`tsqp worker MODEL --listen {endpoint}`" in sentence


@pytest.mark.parametrize(
    ("privacy", "options"),
    [
        ("open", []),
        pytest.param("open", ["--no-shm"], marks=pytest.mark.slow),
        pytest.param("pad", [], marks=pytest.mark.slow),
    ],
    ids=["open, shared memory", "open, inline", "pad"],
)
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGKILL, "is gone: the connection broke"),
        pytest.param(
            signal.SIGSTOP,
            "is gone: the connection broke|stopped answering",
            marks=pytest.mark.slow,  # tests/wire/test_wire_lost.py has the same in less time
        ),
    ],
)
def test_a_worker_lost_in_prefill_or_in_decode_is_an_error(
    number: signal.Signals,
    sentence: str,
    privacy: str,
    options: list[str],
    commands: Commands,
    speaking: Path,
) -> None:
    worker = commands.worker(speaking, TCP, *options)
    endpoint = socket_endpoint(worker.stderr)
    ids = write_ids(commands.folder / "long.json", [7] * 60_000)  # takes minutes in small chunks
    mode = ["--privacy", privacy]
    small = ["--prefill-chunk", 8, "--max-tokens", 1]
    prefill = generate(commands, speaking, endpoint, *mode, "--prompt-ids", ids, *small)
    decode = generate(commands, speaking, endpoint, *mode, "--prompt", "Once upon a time", *LONG)
    prefill.says(CONNECTED)
    decode.answers()
    worker.computes()
    assert prefill.is_alive
    worker.send(number)
    began = time.monotonic()
    for running in (prefill, decode):
        assert re.match(f"The worker at {re.escape(endpoint)} ({sentence})", error(running))
    assert time.monotonic() - began < DEADLINE_S + 1  # for both, which ended at the same time


def test_a_killed_worker_is_replaced_at_the_same_socket_file(commands: Commands, ids: Path) -> None:
    killed = commands.worker("random:tiny", commands.ipc())
    killed.send(signal.SIGKILL)
    killed.ends()
    assert (commands.folder / "worker.sock").is_socket()
    commands.worker("random:tiny", commands.ipc())
    again = generate(commands, "random:tiny", commands.ipc(), "--prompt-ids", ids)
    assert again.ends(START_S).status == 0


def test_a_local_worker_that_cannot_start_is_an_error_with_its_reason(
    commands: Commands, ids: Path
) -> None:
    result = commands.run(
        "generate", "random:tiny", "--privacy", "open", "--worker", "local", "--prompt-ids", ids,
        env={"TSQP_DEVICE": "tpu"},
    )  # fmt: skip
    assert result.status == 1
    assert "The local worker ended with exit status 2: There is no such device" in result.error


def test_a_worker_that_accepts_and_never_answers_is_an_error(commands: Commands, ids: Path) -> None:
    cases = [
        (deaf_socket(), CONNECTING, "does not answer as a TSQP worker, or the worker hangs"),
        (fake_worker(silence), CONNECTING, "accepts connections but does not answer"),
        (fake_worker(silence_after_welcome), CONNECTED, "stopped answering"),
    ]
    with ExitStack() as workers:
        endpoints = [workers.enter_context(worker) for worker, _, _ in cases]
        options = ["--prompt-ids", ids, "--timeout", 2]
        running = [generate(commands, "random:tiny", each, *options) for each in endpoints]
        for endpoint, each, (_, after, sentence) in zip(endpoints, running, cases, strict=True):
            reason = error(each, after)
            assert sentence in reason
            assert endpoint in reason


def test_another_protocol_version_is_named_with_what_to_do(commands: Commands, ids: Path) -> None:
    with fake_worker(newer_version) as endpoint:
        reason = error(generate(commands, "random:tiny", endpoint, "--prompt-ids", ids), CONNECTING)
    assert "protocol version 4 and this side 3; install the same" in reason


@pytest.mark.parametrize(
    ("model", "dtype", "sentence"),
    [
        ("random:tiny:1", "float32", "start both with the same model"),
        ("random:tiny", "bfloat16", "start both with the same --dtype"),
    ],
)
def test_another_model_or_dtype_is_refused_with_what_to_do(
    model: str, dtype: str, sentence: str, commands: Commands, tiny_worker: str, ids: Path
) -> None:
    running = generate(commands, model, tiny_worker, "--prompt-ids", ids, "--dtype", dtype)
    assert sentence in error(running, CONNECTING)


def test_more_clients_than_a_worker_serves_are_refused(
    commands: Commands, tiny_worker: str, ids: Path
) -> None:
    checkpoint = open_checkpoint("random:tiny")
    digest = weights_digest(checkpoint, parse_dtype("float32", checkpoint.config))
    with ExitStack() as clients:
        for _ in range(16):
            hello = Hello(secrets.token_bytes(32), digest, "float32", (), 0)
            clients.callback(RemoteChannel(parse_endpoint(tiny_worker), hello).close)
        running = generate(commands, "random:tiny", tiny_worker, "--prompt-ids", ids)
        assert "has 16 sessions with this user or address already" in error(running, CONNECTING)
    again = generate(commands, "random:tiny", tiny_worker, "--prompt-ids", ids)
    assert again.ends(START_S).status == 0
