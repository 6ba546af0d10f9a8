"""Many clients for a minute, of whom a quarter hang up, and a worker that is killed in between.

Every accepted request ends properly, the answers are those of a quiet server, and nothing is left.
"""

import http.client
import json
import random
import signal
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from protocol_helpers import Commands, mapped_segments
from serve_client import KEY, OTHER_KEY, Server
from serve_process import begin

CLIENTS = 64
SECONDS = 60.0
PROMPTS = [list(range(n, n + length)) for n, length in enumerate([3, 40, 7, 150] * 4)]
MOST_TOKENS = 48
CLOSE = 1e-3  # tokens whose log-probabilities are closer may be exchanged by rounding
MIB = 2**20


def body(prompt: int, max_tokens: int) -> str:
    return json.dumps(
        {
            "prompt": PROMPTS[prompt], "max_tokens": max_tokens, "stream": True,
            "temperature": 0, "ignore_eos": True, "logprobs": 2,
        }
    )  # fmt: skip


@dataclass
class Answer:
    """What came of one request: the text of each token, and how far the next best one was."""

    tokens: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    reason: str | None = None
    error: object = None
    ended: bool = False


def ask(server: Server, prompt: int, max_tokens: int, most_events: int | None = None) -> Answer:
    """Stream one answer, and hang up after so many events, if given."""
    answer = Answer()
    connection = server.connect()
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    with closing(connection):
        connection.request("POST", "/v1/completions", body(prompt, max_tokens), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for number, line in enumerate(iter(response.readline, b"")):
            if most_events is not None and number >= most_events:
                response.close()
                return answer
            if line.startswith(b"data: "):
                read(answer, line.removeprefix(b"data: ").strip())
    return answer


def read(answer: Answer, data: bytes) -> None:
    if data == b"[DONE]":
        answer.ended = True
        return
    event = json.loads(data)
    answer.error = answer.error or event.get("error")
    for choice in event.get("choices", ()):
        answer.reason = choice["finish_reason"] or answer.reason
        found = choice.get("logprobs")
        if found:
            answer.tokens += found["tokens"]
            for best in found["top_logprobs"]:
                first, second = sorted(best.values(), reverse=True)[:2]
                answer.gaps.append(first - second)


def assert_equal(answer: Answer, quiet: Answer) -> None:
    """The same tokens, up to the first place where two were nearly as likely."""
    for ours, theirs, gap in zip(answer.tokens, quiet.tokens, quiet.gaps, strict=False):
        if ours != theirs:
            assert gap < CLOSE
            return


@dataclass
class Client:
    """Asks one question after the other; a quarter of the times it hangs up in the middle."""

    server: Server
    number: int
    until: float
    answers: list[tuple[int, int, Answer]] = field(default_factory=list)
    hung_up: int = 0
    fault: str = ""

    def run(self) -> None:
        choices = random.Random(self.number)
        try:
            while time.monotonic() < self.until:
                prompt, length = choices.randrange(len(PROMPTS)), choices.randint(4, MOST_TOKENS)
                if choices.random() < 0.25:
                    ask(self.server, prompt, length, choices.randint(0, 12))
                    self.hung_up += 1
                else:
                    self.answers.append((prompt, length, ask(self.server, prompt, length)))
        except (OSError, http.client.HTTPException, AssertionError) as error:
            self.fault = f"{type(error).__name__}: {error}"


def crowd(server: Server, seconds: float) -> list[Client]:
    until = time.monotonic() + seconds
    keys = (KEY, OTHER_KEY)
    clients = [Client(Server(server.port, keys[n % 2]), n, until) for n in range(CLIENTS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 120)
        assert not thread.is_alive()
    return clients


def held(pid: int) -> tuple[int, int, int]:
    """Threads, sockets, and segments of shared memory of a process."""
    process = psutil.Process(pid)
    return process.num_threads(), len(process.net_connections()), mapped_segments(pid)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crowd_gets_the_answers_of_a_quiet_server_while_clients_and_the_worker_go(
    model: Path, commands: Commands
) -> None:
    worker = commands.worker(model, commands.ipc())
    running, server = begin(
        commands, model, "--worker", commands.ipc(), "--max-num-seqs", CLIENTS,
        "--max-num-queued-reqs", 2 * CLIENTS, "--pad-memory", 0.05,
        "--kv-memory", 0.05,
    )  # fmt: skip
    quiet = [ask(server, prompt, MOST_TOKENS) for prompt in range(len(PROMPTS))]
    crowd(server, 5)
    server.settles(lambda: server.running() == 0)
    time.sleep(1)
    before, memory = held(running.pid), psutil.Process(running.pid).memory_info().rss

    killed: list[float] = []

    def kill() -> None:
        time.sleep(SECONDS / 2)
        worker.send(signal.SIGKILL)
        worker.ends()
        (commands.folder / "worker.sock").unlink(missing_ok=True)
        commands.worker(model, commands.ipc())
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill)
    killer.start()
    clients = crowd(server, SECONDS)
    killer.join(60)
    assert killed
    assert [client.fault for client in clients if client.fault] == []
    answers = [answer for client in clients for answer in client.answers]
    print(len(answers), "answers,", sum(client.hung_up for client in clients), "hung up")
    assert len(answers) > 2 * CLIENTS
    for prompt, length, answer in answers:
        assert answer.ended
        assert answer.error is None
        assert (answer.reason, len(answer.tokens)) == ("length", length)
        assert_equal(answer, quiet[prompt])

    server.settles(lambda: server.running() == 0)
    server.settles(lambda: held(running.pid) == before)
    assert psutil.Process(running.pid).memory_info().rss < memory + 64 * MIB
    metrics = server.metrics()
    assert metrics["tsqp_worker_reconnects_total"] == 1
    assert metrics["tsqp_kv_cache_usage_perc"] == 0
    assert server.ask("/health").json == {"status": "ready"}
    running.send(signal.SIGTERM)
    assert running.ends().status == 0
