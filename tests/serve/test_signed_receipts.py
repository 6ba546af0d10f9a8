"""Receipts of a real server: each answer has one, which fits nothing else."""

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from attested_server import AttestedServer, trusting_context
from openai import OpenAI
from protocol_helpers import Commands
from serve_client import KEY, OTHER_KEY, Reply, Server

from tsqp.api.receipts import Receipt, split_stream
from tsqp.client.receipts import check_claims, check_receipt
from tsqp.errors import AttestationError

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def checked(server: AttestedServer, reply: Reply, request: bytes) -> Receipt:
    """The receipt of an answer; anything else than this request and answer must not fit it."""
    body, text = split_stream(reply.body)
    text = text or reply.headers["x-tsqp-receipt"]
    claims = server.claims()
    key = claims.public_key
    receipt = check_receipt(text, request=request, response=body, key=key)
    assert receipt.id == reply.headers["x-tsqp-receipt-id"]
    check_claims(receipt, claims, "simulated")
    for wrong in ({"request": request + b" "}, {"response": body[:-1]}, {"key": bytes(32)}):
        given: dict[str, Any] = {"request": request, "response": body, "key": key} | wrong
        with pytest.raises(AttestationError):
            check_receipt(text, **given)
    return receipt


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HELLO, "max_tokens": 4}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 4}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_receipt_of_its_exact_bytes(
    attested_server: AttestedServer, path: str, fields: dict[str, Any], stream: bool
) -> None:
    # Bytes that a JSON parser would not give back.
    request = json.dumps(fields | {"stream": stream}, indent=3).encode() + b"\n "
    reply = attested_server.ask(path, request)
    assert reply.status == 200
    receipt = checked(attested_server, reply, request)
    assert (receipt.path, receipt.status, receipt.platform) == (path, 200, "simulated")
    if stream:
        assert b"x-tsqp-receipt:" not in reply.body
        assert "x-tsqp-receipt" not in reply.headers
        body, _ = split_stream(reply.body)
        assert body.endswith(b"data: [DONE]\n\n" if path != "/v1/responses" else b"}\n\n")


def test_an_error_has_a_receipt_too(attested_server: AttestedServer) -> None:
    for request, status in ((b"{", 400), (b'{"prompt": []}', 400), (b'{"model": "a"}', 400)):
        reply = attested_server.ask("/v1/completions", request)
        assert reply.status == status
        assert checked(attested_server, reply, request).status == status


def test_an_error_in_a_stream_is_part_of_what_is_signed(attested_server: AttestedServer) -> None:
    request = json.dumps({"messages": HELLO, "stream": True, "max_tokens": 10**9}).encode()
    reply = attested_server.ask(CHAT, request)
    assert checked(attested_server, reply, request).status == reply.status


def test_tokens_have_receipts(attested_server: AttestedServer) -> None:
    request = b'{"prompt": "Hello"}'
    reply = attested_server.ask("/tokenize", request)
    assert checked(attested_server, reply, request).path == "/tokenize"


def test_a_receipt_can_be_fetched_with_the_key_of_its_request_only(
    attested_server: AttestedServer,
) -> None:
    request = json.dumps({"prompt": "Hello", "max_tokens": 2, "stream": True}).encode()
    reply = attested_server.ask("/v1/completions", request)
    _, text = split_stream(reply.body)
    place = f"/v1/tsqp/receipts/{reply.headers['x-tsqp-receipt-id']}"
    found = attested_server.ask(place)
    assert (found.status, found.body.decode()) == (200, text)
    other = AttestedServer(attested_server.port, OTHER_KEY)
    absent = attested_server.ask(f"/v1/tsqp/receipts/{'0' * 32}")
    assert other.ask(place).status == absent.status == 404
    assert other.ask(place).error == absent.error
    assert attested_server.ask(place, headers={"Authorization": ""}).status == 401
    assert reply.headers["x-tsqp-receipt-id"] not in attested_server.log()


def test_without_the_option_there_are_no_receipts(server: Server) -> None:
    reply = server.complete("Hello", stream=True)
    assert not any("receipt" in name for name in reply.headers)
    assert split_stream(reply.body)[1] is None
    assert reply.events
    assert server.ask(f"/v1/tsqp/receipts/{'0' * 32}").status == 404


def test_openai_python_reads_answers_with_receipts(attested_server: AttestedServer) -> None:
    with httpx2.Client(verify=trusting_context()) as http:
        client = OpenAI(
            base_url=f"https://127.0.0.1:{attested_server.port}/v1", api_key=KEY, http_client=http,
            max_retries=0,
        )  # fmt: skip
        wanted: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 1}
        text = client.chat.completions.create(**wanted).choices[0].message.content
        pieces = list(client.chat.completions.create(**wanted, stream=True))
        assert "".join(each.choices[0].delta.content or "" for each in pieces) == text
        events = list(client.responses.create(model="tiny", input="Hello", stream=True))
        assert events[-1].type in ("response.completed", "response.incomplete")


def test_the_command_checks_files(
    attested_server: AttestedServer, commands: Commands, tmp_path: Path
) -> None:
    request = b'{"prompt": "Hello", "max_tokens": 2}'
    reply = attested_server.ask("/v1/completions", request)
    evidence = attested_server.evidence(bytes(32)).to_json()
    contents = {
        "request": request,
        "response": reply.body,
        "receipt": reply.headers["x-tsqp-receipt"].encode(),
        "evidence": evidence,
    }
    flags: list[object] = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        flags += [f"--{name}", tmp_path / name]
    unverified = commands.run("verify-receipt", *flags)
    assert (unverified.status, unverified.stdout) == (2, "")
    assert "give --policy FILE" in unverified.stderr
    policy = tmp_path / "policy.toml"
    for allow, at, status in (
        (True, (), 0),
        (False, (), 1),
        (True, ("--at", "1999-01-01"), 1),  # before the platform's certificates
    ):
        policy.write_text(
            f'platforms = ["sgx"]\nany_measurement = true\nallow_simulated = {str(allow).lower()}\n'
        )
        result = commands.run("verify-receipt", *flags, "--policy", policy, *at, "--json")
        assert result.status == status, result
        assert "simulated: proves nothing" in result.stderr
        if status == 0:
            assert result.json["valid"] is True
            hashed = hashlib.sha256(reply.body).hexdigest()
            assert result.json["receipt"]["response"] == hashed
            assert len(result.json["warnings"]) == 1 and "SIMULATED" in result.json["warnings"][0]
    flags += ["--policy", policy]
    policy.write_text(policy.read_text().replace("false", "true"))
    (tmp_path / "response").write_bytes(reply.body + b" ")
    assert "another response" in commands.fails("verify-receipt", *flags)


def test_the_command_checks_a_saved_stream_with_a_key(
    attested_server: AttestedServer, commands: Commands, tmp_path: Path
) -> None:
    request = b'{"prompt": "Hello", "max_tokens": 2, "stream": true}'
    (tmp_path / "request").write_bytes(request)
    (tmp_path / "response").write_bytes(attested_server.ask("/v1/completions", request).body)
    key = attested_server.claims().public_key.hex()
    flags = ["--request", tmp_path / "request", "--response", tmp_path / "response"]
    result = commands.run("verify-receipt", *flags, "--key", key)
    assert result.status == 0, result
    assert "The receipt is valid" in result.stdout and "SIMULATED" in result.stdout
    assert "No evidence was verified" in result.stdout
    error = commands.fails("verify-receipt", *flags, "--key", "0" * 64)
    assert "another key" in error
    assert commands.run("verify-receipt", *flags).status == 2
    assert commands.run("verify-receipt", *flags, "--key", "1").status == 2
