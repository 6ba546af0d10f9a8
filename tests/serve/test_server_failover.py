"""A server whose workers lie: another takes over, and everybody who watches can see it."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from liars import LyingWorker
from lies import Order
from protocol_helpers import Commands
from serve_client import Server
from serve_process import begin

LATE = {"layer": 1, "group": "down", "after": 20}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "seed": 1}
PROMPT = [3, 141, 59]


@contextmanager
def two_liars(commands: Commands) -> Iterator[list[LyingWorker]]:
    liars = [LyingWorker(commands, name) for name in ("first", "second")]
    try:
        for liar in liars:
            liar.running.says("serving ")
        yield liars
    finally:
        for liar in liars:
            if liar.running.is_alive:
                liar.close()
            elif liar.running.process.stdin is not None:
                liar.running.process.stdin.close()


def answer(server: Server) -> object:
    reply = server.ask("/v1/completions", {"prompt": PROMPT, "logprobs": 0, **GREEDY})
    assert reply.status == 200, reply.body
    return reply.json["choices"]


def workers(server: Server) -> list[dict[str, str]]:
    found: list[dict[str, str]] = server.ask("/v1/tsqp/status").json["workers"]
    return found


def states(server: Server) -> dict[str, float]:
    return {
        name.split('"')[1]: value
        for name, value in server.metrics().items()
        if name.startswith("tsqp_workers{")
    }


@pytest.mark.slow
def test_another_worker_takes_over_from_a_liar_and_the_server_says_so(commands: Commands) -> None:
    with two_liars(commands) as liars:
        liars[0].order(Order("zeros", **LATE))  # type: ignore[arg-type]
        running, server = begin(
            commands, "random:tiny", "--worker", liars[0].endpoint, "--worker", liars[1].endpoint,
            "--pad-memory", 0, "--field", "wide",
        )  # fmt: skip
        asked = liars[0].sessions
        assert workers(server) == [{"state": "in use"}, {"state": "standby"}]
        assert server.ask("/health").json == {"status": "ready"}
        first = answer(server)
        lied = {"state": "quarantined", "error": "IntegrityError"}
        assert workers(server) == [lied, {"state": "in use"}]
        health = server.ask("/health")
        assert (health.status, health.json) == (200, {"status": "ready", "quarantined": 1})
        assert states(server) == {"in use": 1, "standby": 0, "lost": 0, "quarantined": 1}
        metrics = server.metrics()
        assert metrics["tsqp_integrity_failures_total"] == 1
        assert (metrics["tsqp_integrity_failed"], metrics["tsqp_healthy"]) == (0, 1)
        assert "takes over" in running.stderr
        assert answer(server) == first  # which the liar did not touch
        assert liars[0].sessions == asked

        status = server.ask("/v1/tsqp/status").body + health.body
        assert b"sock" not in status  # endpoints are for the log

        liars[1].running.send(9)  # type: ignore[arg-type]
        liars[1].running.ends()
        with closing(server.connect()) as waiting:
            body = json.dumps({"prompt": PROMPT, "logprobs": 0, **GREEDY})
            headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
            waiting.request("POST", "/v1/completions", body, headers)
            server.settles(lambda: workers(server) == [lied, {"state": "lost"}])
            assert server.ask("/health").status == 503
            commands.worker("random:tiny", liars[1].endpoint)
            assert json.loads(waiting.getresponse().read())["choices"] == first
        assert server.ask("/health").json == {"status": "ready", "quarantined": 1}
        assert liars[0].sessions == asked


def test_a_server_without_an_honest_worker_says_so(commands: Commands) -> None:
    with two_liars(commands) as liars:
        for liar in liars:
            liar.order(Order("zeros"))
        _, server = begin(
            commands, "random:tiny", "--worker", liars[0].endpoint, "--worker", liars[1].endpoint,
            "--pad-memory", 0, "--field", "wide",
        )  # fmt: skip
        reply = server.ask("/v1/completions", {"prompt": PROMPT, **GREEDY})
        assert (reply.status, reply.error["code"]) == (503, "failed")
        health = server.ask("/health")
        assert (health.status, health.json) == (503, {"status": "failed", "quarantined": 2})
        metrics = server.metrics()
        assert metrics["tsqp_integrity_failures_total"] == 2
        assert (metrics["tsqp_integrity_failed"], metrics["tsqp_healthy"]) == (1, 0)
        assert states(server)["quarantined"] == 2
        assert [liar.sessions for liar in liars] == [1, 1]
