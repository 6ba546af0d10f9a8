"""A word of a prompt is found nowhere but in the answer to it."""

import base64
import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
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
    server.ask("/tokenize", {"prompt": CANARY}, headers={"X-Request-Id": CANARY})
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
    with socket.create_connection(("127.0.0.1", server.port), 60) as link:
        link.sendall(f"{CANARY} {CANARY}\r\n\r\n".encode())
        link.recv(65536)


SCHEMA = {
    "type": "object",
    "properties": {CANARY: {"enum": [CANARY]}},
    "required": [CANARY],
    "additionalProperties": False,
    "description": CANARY,
}
TOOL = {
    "type": "function",
    "function": {"name": CANARY, "description": CANARY, "parameters": SCHEMA},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": CANARY, "schema": SCHEMA}}
HISTORY = [
    {"role": "developer", "content": CANARY},
    {"role": "user", "content": [{"type": "text", "text": CANARY}], "name": CANARY},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": CANARY, "type": "function",
         "function": {"name": CANARY, "arguments": json.dumps({CANARY: CANARY})}}]},
    {"role": "tool", "tool_call_id": CANARY, "content": CANARY},
]  # fmt: skip
# Fields of all requests for answers; half of them are wrong.
FIELDS: list[dict[str, object]] = [
    {}, {"temperature": 0}, {"temperature": CANARY}, {"model": CANARY}, {"user": CANARY},
    {"stop": [CANARY]}, {"stop": CANARY}, {"stop": [CANARY * 100]}, {"logit_bias": {CANARY: 1}},
    {"n": CANARY}, {"n": 2, "seed": 1}, {"cache_salt": CANARY}, {"cache_salt": [CANARY]},
    {CANARY: CANARY}, {"metadata": {CANARY: CANARY}}, {"seed": CANARY}, {"top_p": CANARY},
    {"structured_outputs": {"choice": [CANARY]}, "max_tokens": 30},
    {"structured_outputs": {"regex": CANARY}, "max_tokens": 30},
    {"structured_outputs": {"grammar": f'start: "{CANARY}"'}, "max_tokens": 30},
    {"structured_outputs": {"json": SCHEMA}, "max_tokens": 90},
    {"structured_outputs": {"grammar": CANARY}}, {"structured_outputs": {"regex": f"({CANARY}"}},
    {"structured_outputs": {CANARY: CANARY}}, {"structured_outputs": {"json": CANARY}},
    {"response_format": FORMAT, "max_tokens": 90}, {"response_format": {"type": CANARY}},
    {"response_format": {**FORMAT, "json_schema": {"name": "a", "schema": {"type": CANARY}}}},
    {"response_format": {**FORMAT, "json_schema": {"name": "a", "schema": {"$ref": CANARY}}}},
]  # fmt: skip
OF_CHATS: list[dict[str, object]] = [
    {"messages": HISTORY}, {"messages": [{"role": CANARY, "content": CANARY}]},
    {"messages": [{"role": "user", "content": [{"type": CANARY, CANARY: CANARY}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"id": CANARY, "function": {
        "name": CANARY, "arguments": CANARY}}]}]},
    {"tools": [TOOL], "tool_choice": "required", "max_tokens": 120},
    {"tools": [TOOL]}, {"tools": [{"type": CANARY}]}, {"tools": [TOOL], "tool_choice": CANARY},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
    {"chat_template_kwargs": {CANARY: CANARY}}, {"chat_template_kwargs": {"messages": CANARY}},
    {"logprobs": True, "top_logprobs": 2}, {"split_special": True},
    {"continue_final_message": True},
]  # fmt: skip
OF_COMPLETIONS: list[dict[str, object]] = [
    {"echo": True, "logprobs": 2}, {"echo": True, "max_tokens": 0}, {"prompt": [CANARY, CANARY]},
    {"prompt": [CANARY, 1]}, {"suffix": CANARY}, {"best_of": CANARY}, {"prompt": CANARY * 300},
    {"return_token_ids": True},
]  # fmt: skip
OF_RESPONSES: list[dict[str, object]] = [
    {}, {"instructions": CANARY}, {"metadata": {CANARY: CANARY}}, {"previous_response_id": CANARY},
    {"input": [{"type": CANARY, CANARY: CANARY}]}, {"text": {"format": {"type": CANARY}}},
    {"text": {"format": {"type": "json_schema", "name": CANARY, "schema": SCHEMA}}},
    {"tools": [{"type": "function", **TOOL["function"]}], "tool_choice": "required"},
    {"tools": [{"type": CANARY}]}, {"temperature": CANARY}, {"model": CANARY},
    {"input": [{"role": "developer", "content": CANARY},
               {"type": "function_call", "call_id": CANARY, "name": CANARY, "arguments": CANARY}]},
]  # fmt: skip
OF_TOKENIZE: list[dict[str, object]] = [
    {"prompt": CANARY, "return_token_strs": True}, {"messages": HISTORY}, {"prompt": [CANARY]},
    {"messages": [{CANARY: CANARY}]}, {"prompt": CANARY, "messages": HISTORY}, {"model": CANARY},
]  # fmt: skip
HEADERS = [
    {}, {"X-Request-Id": CANARY}, {"X-Request-Id": f"{CANARY} {CANARY}"}, {"User-Agent": CANARY},
    {"Cookie": CANARY}, {"X-Forwarded-For": CANARY}, {"Accept": CANARY}, {"Referer": CANARY},
]  # fmt: skip


def everything() -> Iterator[tuple[str, object]]:
    """Requests to all endpoints that take a body."""
    for path, base, own in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": CANARY}]}, OF_CHATS),
        ("/v1/completions", {"prompt": CANARY}, OF_COMPLETIONS),
    ):
        for fields in FIELDS + own:
            for stream in (False, True):
                yield path, {"max_tokens": 3, **base, **fields, "stream": stream}
    for fields in OF_RESPONSES:
        for stream in (False, True):
            yield (
                "/v1/responses",
                {"input": CANARY, "max_output_tokens": 90, **fields, "stream": stream},
            )
    for fields in OF_TOKENIZE:
        yield "/tokenize", fields
    yield "/detokenize", {"tokens": [CANARY]}
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ):
        yield path, b"{" + CANARY.encode()
        yield f"{path}/{CANARY}?{CANARY}={CANARY}", {CANARY: CANARY}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_requests_of_all_kinds_leave_no_trace(model: Path, commands: Commands) -> None:
    """Logs at their most, a call log, and a worker that records all that it receives."""
    folder = commands.folder / "traces"
    folder.mkdir()
    worker = commands.start(
        "worker", model, "--listen", commands.ipc(), "--record", folder / "recording", "--debug"
    )
    worker.says("serving ")
    running, server = begin(
        commands, model, "--worker", commands.ipc(), "--debug", "--pad-memory", 0.01,
        "--rpc-log", folder / "calls.jsonl", "--show-worker-view",
    )  # fmt: skip
    count, said = 0, 0
    for number, (path, body) in enumerate(everything()):
        headers = HEADERS[number % len(HEADERS)]
        reply = server.ask(path, body, headers=headers)
        count += 1
        assert reply.status < 500, (path, body, reply.body)
        shown = {name: value for name, value in reply.headers.items() if name != "x-request-id"}
        assert CANARY not in str(shown)
        if reply.status >= 400:
            assert CANARY not in reply.body.decode(), (path, body)
        said += reply.status == 200 and CANARY in reply.body.decode()
    assert count > 200 and said > 20
    for key in (CANARY, f"{server.key}{CANARY}"):
        assert server.ask("/v1/models", headers={"Authorization": f"Bearer {key}"}).status == 401
    for method in ("GET", "DELETE", CANARY):
        server.ask(f"/v1/tsqp/view/{CANARY}", method=method)
    _send_garbage(server)
    ids = server.ask("/tokenize", {"prompt": CANARY}).json["tokens"]
    places = [
        server.ask(path).body
        for path in ("/metrics", "/v1/tsqp/status", "/v1/models", "/version", "/health")
    ]
    for each in (running, worker):
        each.send(signal.SIGTERM)
        result = each.ends()
        places += [result.stderr.encode(), result.stdout.encode()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2
    places += [path.read_bytes() for path in files] + [str(path).encode() for path in files]
    traces = [CANARY, CANARY[6:], base64.b64encode(CANARY.encode()).decode()]
    traces += [separator.join(map(str, ids)) for separator in (",", ", ", " ")]
    for place in places:
        for trace in traces:
            assert trace.encode() not in place
