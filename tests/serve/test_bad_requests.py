"""Wrong requests: OpenAI's form of error, nothing of what was sent in it, and never a 500."""

import asyncio
import json
import socket
from typing import Any

import pytest
from serve_client import DEADLINE_S, KEY, Server

from tsqp.serve.middleware import Gate
from tsqp.serve.options import ServeOptions

CANARY = "CANARYtulip7391"
HTTP_CPU = "tsqp_http_cpu_seconds_total"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: object) -> tuple[str, object]:
    return CHAT, {"messages": HELLO} | fields


def said(text: str, more: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": "' + text.encode() + b'"}]' + more + b"}"


def deep(levels: int) -> bytes:
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}"


def function(parameters: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "add", "parameters": parameters}}


def called(function: object) -> list[dict[str, object]]:
    return [{"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}]


def schema(given: object, **more: object) -> tuple[str, dict[str, object]]:
    form = {"name": "a", "schema": given} | more
    return CHAT, {
        "messages": HELLO,
        "response_format": {"type": "json_schema", "json_schema": form},
    }


def nested(levels: int) -> dict[str, object]:
    found: dict[str, object] = {"type": "integer"}
    for _ in range(levels):
        found = {"type": "array", "items": found}
    return found


ADD = function({"type": "object", "properties": {"a": {"type": "integer"}}})

WRONG: dict[str, tuple[str, object, str | None]] = {
    "no messages": (CHAT, {}, "messages"),
    "empty messages": (CHAT, {"messages": []}, "messages"),
    "messages are text": (CHAT, {"messages": CANARY}, "messages"),
    "a message is text": (CHAT, {"messages": [CANARY]}, "messages[0]"),
    "no role": (CHAT, {"messages": [{"content": CANARY}]}, "messages"),
    "a role of a wrong type": (CHAT, {"messages": [{"role": 1, "content": CANARY}]}, "messages"),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}]},
        "messages",
    ),
    "a part of no type": (CHAT, {"messages": [{"role": "user", "content": [CANARY]}]}, "messages"),
    "half a surrogate pair": (CHAT, said("\\ud800", b""), "messages"),
    "huge n": (*chat(n=10**9), "n"),
    "more answers than may wait": (*chat(n=33, seed=1), "n"),
    "n at temperature 0": (*chat(n=2, temperature=0), None),
    "negative n": (*chat(n=-1), "n"),
    "no tokens": (*chat(max_tokens=0), "max_tokens"),
    "negative tokens": (*chat(max_tokens=-5), "max_tokens"),
    "negative temperature": (*chat(temperature=-1), "temperature"),
    "no number": (CHAT, said("a", b', "temperature": NaN'), "temperature"),
    "infinite": (CHAT, said("a", b', "top_p": 1e999'), "top_p"),
    "text for a number": (*chat(temperature=CANARY), "temperature"),
    "true for a number": (*chat(max_tokens=True), "max_tokens"),
    "top_p": (*chat(top_p=7), "top_p"),
    "a seed of 90 bits": (*chat(seed=2**90), None),
    "a number of 5,000 digits": (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", None),
    "bias of a word": (*chat(logit_bias={CANARY: 1}), None),
    "bias of a word's type": (*chat(logit_bias={CANARY: CANARY}), "logit_bias"),
    "bias of an unknown token": (*chat(logit_bias={"99999": 1}), "logit_bias"),
    "too many top_logprobs": (*chat(top_logprobs=999), "top_logprobs"),
    "top_logprobs and no logprobs": (*chat(top_logprobs=2), "top_logprobs"),
    "options of no stream": (*chat(stream_options={}), "stream_options"),
    "an unknown format": (*chat(response_format={"type": CANARY}), "response_format"),
    "tool_choice and no tools": (*chat(tool_choice="required"), "tool_choice"),
    "tools of a wrong form": (*chat(tools=[{"type": CANARY}]), "tools[0].type"),
    "tools of one name": (*chat(tools=[ADD, ADD]), "tools"),
    "a tool_choice of no tool": (
        *chat(tools=[ADD], tool_choice={"type": "function", "function": {"name": CANARY}}),
        "tool_choice",
    ),
    "a tool of a schema that nothing satisfies": (
        *chat(tools=[function({"type": "object", "properties": {CANARY: False},
                               "required": [CANARY]})]),
        "tools",
    ),
    "a tool of a schema of a wrong type": (*chat(tools=[function({"type": CANARY})]), "tools"),
    "a call of no name": (CHAT, {"messages": called({"arguments": CANARY})}, "messages"),
    "a call of arguments that are no JSON": (
        CHAT, {"messages": called({"name": "add", "arguments": CANARY})}, "messages",
    ),
    "a call of deep arguments": (
        CHAT, {"messages": called({"name": "add", "arguments": "[" * 10**5})}, "messages",
    ),
    "calls of a wrong type": (
        CHAT, {"messages": [{"role": "assistant", "tool_calls": CANARY}]}, "messages",
    ),
    "a format of a wrong schema": (*schema(CANARY), "response_format.json_schema.schema"),
    "a format of no schema": (
        *chat(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        "response_format",
    ),
    "a schema that nothing satisfies": (
        *schema({"type": "string", "minLength": 3, "maxLength": 2}), "response_format",
    ),
    "a schema of an unknown type": (*schema({"type": CANARY}), "response_format"),
    "a schema of unknown keywords": (
        *schema({"not": {"type": CANARY}}, strict=True), "response_format",
    ),
    "a schema that refers to nothing": (*schema({"$ref": f"#/{CANARY}"}), "response_format"),
    "a schema of a wrong pattern": (
        *schema({"type": "string", "pattern": f"({CANARY}"}), "response_format",
    ),
    "a schema that is too deep": (*schema(nested(70)), "response_format"),
    "a schema that is too large": (*schema({"enum": [CANARY * 20_000]}), "response_format"),
    "a schema that is too complex": (
        *schema({"properties": {f"p{number}": {} for number in range(4500)}}),
        "response_format",
    ),
    "a completion's schema that nothing satisfies": (
        COMPLETIONS,
        {"prompt": "a", "response_format": schema({"enum": []})[1]["response_format"]},
        "response_format",
    ),
    "values for the template": (*chat(chat_template_kwargs={"messages": CANARY}), None),
    "a value that is Python's": (*chat(chat_template_kwargs={"self": CANARY}), None),
    "a long stop string": (*chat(stop=1025 * "a"), "stop"),
    "too many biases": (*chat(logit_bias={str(n): CANARY for n in range(1025)}), "logit_bias"),
    "no prompt": (COMPLETIONS, {}, "prompt"),
    "an empty prompt": (COMPLETIONS, {"prompt": ""}, "prompt"),
    "no prompts": (COMPLETIONS, {"prompt": []}, "prompt"),
    "prompts of two kinds": (COMPLETIONS, {"prompt": [CANARY, 1]}, "prompt"),
    "an unknown token": (COMPLETIONS, {"prompt": [10**6]}, "prompt"),
    "a negative token": (COMPLETIONS, {"prompt": [-1], "echo": True}, "prompt"),
    "a token of 100 bits": (COMPLETIONS, {"prompt": [2**100], "echo": True}, "prompt"),
    "best_of": (COMPLETIONS, {"prompt": CANARY, "best_of": 3}, None),
    "a suffix": (COMPLETIONS, {"prompt": CANARY, "suffix": CANARY}, "suffix"),
    "no JSON": (CHAT, b"{" + CANARY.encode(), None),
    "no object": (CHAT, [CANARY], None),
    "null": (CHAT, b"null", None),
    "nothing": (CHAT, b"", None),
    "no UTF-8": (CHAT, b'{"messages": "\xff\xfe"}', None),
    "deep": (CHAT, deep(500), None),
    "deeper": (CHAT, deep(100_000), None),
    "deep for the template": (
        CHAT,
        said("a", b', "chat_template_kwargs": {"a": ' + b"[" * 90 + b"]" * 90 + b"}"),
        None,
    ),
    "tokens of text": ("/detokenize", {"tokens": [CANARY]}, "tokens[0]"),
    "tokens of 40 bits": ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_one_clear_error_that_quotes_nothing(server: Server, name: str) -> None:
    path, body, param = WRONG[name]
    reply = server.ask(path, body, method="POST")
    assert reply.status == 400, reply.body
    error = reply.error
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    assert CANARY not in reply.body.decode()
    if param is not None:
        assert error["param"] == param, error
    if isinstance(body, dict) and path == CHAT:
        assert server.ask(path, body | {"stream": True}).status == 400 or "stream" in name


def test_many_wrong_items_are_one_error_and_take_no_longer(server: Server) -> None:
    """One error for each would keep everybody waiting for seconds."""
    for path, fields in (
        ("/v1/completions", {"prompt": [{}] * 300_000}),
        ("/v1/completions", {"prompt": [[{}] * 300_000]}),
        ("/detokenize", {"tokens": [{}] * 300_000}),
        ("/v1/chat/completions", {"messages": [1] * 300_000}),
    ):
        before = server.metrics()[HTTP_CPU]
        assert server.ask(path, fields).status == 400
        assert server.metrics()[HTTP_CPU] - before < 2


def test_a_prompt_that_is_too_long_says_what_fits(server: Server) -> None:
    for reply in (
        server.chat("a" * 5000),
        server.complete("a" * 5000),
        server.complete([1] * 5000),
    ):
        assert reply.status == 400
        assert reply.error["code"] == "context_length_exceeded"
        assert "maximum context length is 4096 tokens" in reply.error["message"]


def test_another_model_and_another_path_are_not_found(server: Server) -> None:
    reply = server.chat(model=CANARY)
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")
    assert CANARY not in reply.body.decode()
    reply = server.ask(f"/v1/{CANARY}")
    assert reply.status == 404 and reply.error and CANARY not in reply.body.decode()
    reply = server.ask("/v1/models", {"a": 1})
    assert reply.status == 405 and reply.error
    assert CANARY not in server.log()


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xe9"]
)
def test_everything_but_the_health_needs_a_key(server: Server, authorization: str) -> None:
    headers = {"Authorization": authorization}
    for path in (
        "/v1/models",
        "/metrics",
        "/v1/tsqp/status",
        "/openapi.json",
        "/version",
        "/nothing",
    ):
        reply = server.ask(path, headers=headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert server.ask("/health", headers=headers).json == {"status": "ready"}


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    reply = server.ask(CHAT, b"x" * (4 * 2**20 + 1))
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as link:
        link.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Length: {10**12}\r\n\r\n".encode()
        )
        assert b" 413 " in link.recv(65536)


def gate(messages: list[dict[str, Any]], options: ServeOptions) -> tuple[int, bytes, list[object]]:
    """What the gate answers to the parts of a body, and what the app behind it saw."""
    sent: list[dict[str, Any]] = []
    seen: list[object] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        raise ZeroDivisionError(CANARY)

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(DEADLINE_S)
        raise AssertionError("the body is awaited for too long")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "root_path": ""}
    asyncio.run(asyncio.wait_for(Gate(app, options)(scope, receive, send), DEADLINE_S))
    status = sent[0]["status"] if sent else 0
    return status, b"".join(each.get("body", b"") for each in sent), seen


def test_a_body_that_trickles_in_is_given_up() -> None:
    first = {"type": "http.request", "body": b"{", "more_body": True}
    status, body, seen = gate([first], ServeOptions(body_timeout=0.05))
    assert (status, seen) == (408, [])
    assert "did not arrive within 0.05 seconds" in json.loads(body)["error"]["message"]


def test_a_body_in_parts_is_limited_and_a_client_that_hangs_up_is_forgotten() -> None:
    part = {"type": "http.request", "body": b"x" * 60, "more_body": True}
    assert gate([part, part], ServeOptions(max_body_bytes=14))[0] == 413
    assert gate([part, {"type": "http.disconnect"}], ServeOptions())[0] == 0


def test_a_fault_of_the_program_is_an_error_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = {"type": "http.request", "body": b"{}"}
    status, body, seen = gate([whole], ServeOptions())
    assert (status, seen) == (500, [b"{}"])
    assert json.loads(body)["error"]["type"] == "server_error"
    assert CANARY not in body.decode() + caplog.text
    assert "ZeroDivisionError" in caplog.text
