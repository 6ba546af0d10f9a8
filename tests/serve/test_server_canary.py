"""A word of a prompt is found nowhere but in the answer to it."""

import re
from pathlib import Path

from protocol_helpers import Commands
from serve_client import Server
from serve_process import begin

CANARY = "CANARYmarigold5518"


def test_nothing_of_requests_and_answers_is_logged_counted_or_written(
    model: Path, commands: Commands
) -> None:
    """With --debug, a call log, and errors of every kind."""
    calls = commands.folder / "calls.jsonl"
    running, server = begin(
        commands, model, "--privacy", "pad", "--worker", "local", "--debug", "--rpc-log", calls,
        "--pad-memory", 0.01,
    )  # fmt: skip
    bodies: list[dict[str, object]] = [
        {}, {"stream": True}, {"temperature": CANARY}, {"model": CANARY}, {"user": CANARY},
        {"stop": [CANARY]}, {"logit_bias": {CANARY: 1}}, {"tools": [{"type": CANARY}]}, {CANARY: 1},
        {"chat_template_kwargs": {CANARY: CANARY}}, {"n": CANARY}, {"cache_salt": CANARY},
        {"response_format": {"type": "json_schema", "json_schema": {"name": CANARY}}},
    ]  # fmt: skip
    for body in bodies:
        assert server.chat(CANARY, **body).status < 500
        server.complete(CANARY, **{**body, "echo": True, "logprobs": 1})
    server.ask("/tokenize", {"prompt": CANARY})
    server.ask(f"/{CANARY}?q={CANARY}", {"a": CANARY})
    server.ask("/v1/chat/completions", b"{" + CANARY.encode())
    server.ask("/v1/models", headers={"Authorization": f"Bearer {CANARY}", "Cookie": CANARY})
    _send_garbage(server)
    answers = [server.chat(CANARY, temperature=0, max_tokens=24).json for _ in range(2)]
    text = answers[0]["choices"][0]["message"]["content"]
    assert text == answers[1]["choices"][0]["message"]["content"]
    metrics = server.ask("/metrics").body.decode()
    status = server.ask("/v1/tsqp/status").body.decode()
    running.send(15)  # type: ignore[arg-type]
    result = running.ends()
    log = calls.read_text()
    assert len(re.findall(r"request id=\w+ method=POST", result.stderr)) > 25
    for place in (result.stderr, result.stdout, metrics, status, log):
        assert CANARY not in place
        assert CANARY[6:] not in place
        assert len(text) < 8 or text not in place
    assert "Traceback" not in result.stderr


def _send_garbage(server: Server) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", server.port), 60) as link:
        link.sendall(f"{CANARY} {CANARY}\r\n\r\n".encode())
        link.recv(65536)
