"""`tsqp proxy`, a real process: it forwards to the verified server, and to nobody else."""

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attested_stub import POLICY_FILE, PROMPT, AttestedStub, Identity, make_evidence, policy_file
from openai import OpenAI
from protocol_helpers import Commands, Running, eventually

CHAT = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}


@pytest.fixture
def stub() -> Iterator[AttestedStub]:
    with AttestedStub() as server:
        yield server


class Proxied:
    """A running proxy."""

    def __init__(self, commands: Commands, stub: AttestedStub, *arguments: object) -> None:
        policy = commands.folder / "policy.toml"
        if not policy.exists():
            policy_file(commands.folder)
        self.running: Running = commands.start(
            "proxy", stub.url, "--policy", policy, "--port", 0, *arguments
        )
        self.running.says("forwarding http://127.0.0.1:")
        self.port = int(self.running.stderr.partition("127.0.0.1:")[2].partition("/")[0])

    def ask(
        self,
        path: str = "/v1/chat/completions",
        body: object = CHAT,
        method: str = "POST",
        **headers: str,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        content = None if method == "GET" else json.dumps(body)
        connection.request(method, path, content, named)
        answer = connection.getresponse()
        try:
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def error(self) -> tuple[int, str]:
        """The status and code of a request that fails."""
        status, _, body = self.ask()
        [error] = json.loads(body).values()
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "server_error"
        return status, error["code"]


def test_requests_and_answers_pass_unchanged(commands: Commands, stub: AttestedStub) -> None:
    proxy = Proxied(commands, stub)
    status, headers, body = proxy.ask(
        "/v1/chat/completions?a=b%20c", Authorization="Bearer key", X_Mine="1",
        Connection="keep-alive, X-Hop", X_Hop="2", Accept_Encoding="identity",
    )  # fmt: skip
    echoed = json.loads(body)
    assert (status, headers["X-Own"], headers["Content-Type"]) == (200, "yes", "application/json")
    assert echoed["path"] == "/v1/chat/completions?a=b%20c"
    assert json.loads(echoed["body"]) == CHAT
    sent = {name.lower(): value for name, value in echoed["headers"].items()}
    assert (sent["authorization"], sent["x-mine"]) == ("Bearer key", "1")
    assert sent["host"] == f"127.0.0.1:{stub.port}"
    assert not {"x-hop", "user-agent"} & set(sent)
    assert proxy.ask("/health", method="GET")[0] == 200
    assert proxy.ask("/metrics", method="GET")[0] == 404
    assert proxy.ask(Host="evil.example")[0] == 421  # a page that calls itself this machine
    assert PROMPT not in proxy.running.stderr


def test_streams_pass_piece_by_piece(commands: Commands, stub: AttestedStub) -> None:
    proxy = Proxied(commands, stub)
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(CHAT | {"stream": True}))
    answer = connection.getresponse()
    assert answer.read1(100).startswith(b"data: first")  # the stream has not ended
    stub.streaming.set()
    assert answer.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_a_client_that_hangs_up_ends_its_request(commands: Commands, stub: AttestedStub) -> None:
    proxy = Proxied(commands, stub)
    with socket.create_connection(("127.0.0.1", proxy.port), 30) as raw:
        body = json.dumps(CHAT | {"stream": True}).encode()
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert b"200 OK" in raw.recv(1000)
    assert stub.hung_up.wait(30)


def test_openai_python_streams_through_the_proxy(commands: Commands, stub: AttestedStub) -> None:
    proxy = Proxied(commands, stub)
    url = f"http://127.0.0.1:{proxy.port}/v1"
    with OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        assert list(client.models.list()) == []


def test_the_api_key_of_a_file_takes_the_place_of_the_clients(
    commands: Commands, stub: AttestedStub
) -> None:
    file = commands.folder / "key"
    file.write_text("the-real-key\n")
    file.chmod(0o600)
    proxy = Proxied(commands, stub, "--api-key-file", file)
    sent = json.loads(proxy.ask(Authorization="Bearer other")[2])["headers"]
    given = {name.lower(): value for name, value in sent.items()}
    assert given["authorization"] == "Bearer the-real-key"
    assert "the-real-key" not in proxy.running.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_proxy(
    commands: Commands, stub: AttestedStub, number: signal.Signals
) -> None:
    proxy = Proxied(commands, stub)
    assert proxy.ask()[0] == 200
    proxy.running.send(number)
    assert proxy.running.ends().status == 0


@pytest.mark.parametrize(
    "lie", [{"privacy": "open"}, {"public_key": b"k" * 32}, {"nonce": b"n" * 32}]
)
def test_a_server_that_is_refused_at_the_start_is_an_error(
    commands: Commands, stub: AttestedStub, lie: dict[str, object]
) -> None:
    stub.answer = lambda key, nonce: make_evidence(
        **({"public_key": key, "nonce": nonce} | lie)  # type: ignore[arg-type]
    ).to_json()
    result = commands.run("proxy", stub.url, "--policy", policy_file(commands.folder), "--port", 0)
    assert result.status == 1
    assert "The server is not verified" in result.stderr
    assert stub.received == []


def test_a_server_that_changes_is_verified_again(commands: Commands, stub: AttestedStub) -> None:
    proxy = Proxied(commands, stub)
    assert proxy.ask()[0] == 200
    port, asked = stub.port, stub.asked
    stub.close()
    assert eventually(lambda: proxy.error() == (503, "server_unavailable"))
    with AttestedStub(port=port) as restarted:  # with a new key, which its evidence names
        assert eventually(lambda: proxy.ask()[0] == 200)
        assert restarted.asked == 1
        assert PROMPT.encode() in restarted.received[0]
    assert asked == 1


def test_a_man_in_the_middle_gets_nothing_of_a_later_request(
    commands: Commands, stub: AttestedStub
) -> None:
    proxy = Proxied(commands, stub)
    assert proxy.ask()[0] == 200
    honest, port = stub.identity, stub.port
    stub.close()
    authority = Identity()
    with AttestedStub(Identity(authority), port=port) as man:
        man.answer = lambda _, nonce: make_evidence(honest.hash, nonce).to_json()
        assert eventually(lambda: proxy.error() == (502, "attestation_failed"))
        assert proxy.ask("/health", method="GET")[0] == 503
        assert man.received == []
        man.identity = honest  # the server is back
        assert eventually(lambda: proxy.ask()[0] == 200)


def test_a_verification_holds_for_a_limited_time(commands: Commands, stub: AttestedStub) -> None:
    proxy = Proxied(commands, stub, "--reverify-seconds", 0.3)
    assert proxy.ask()[0] == 200
    time.sleep(0.4)
    stub.answer = lambda key, nonce: make_evidence(key, nonce, privacy="open").to_json()
    assert proxy.error() == (502, "attestation_failed")
    assert len(stub.received) == 1


def test_a_policy_that_changes_counts_at_the_next_verification(
    commands: Commands, stub: AttestedStub
) -> None:
    proxy = Proxied(commands, stub, "--reverify-seconds", 0.3)
    assert proxy.ask()[0] == 200
    policy_file(commands.folder, POLICY_FILE.replace('"pad"', '"shares"'))
    time.sleep(0.4)
    assert proxy.error() == (502, "attestation_failed")
    policy_file(commands.folder, "nonsense")
    assert eventually(lambda: "not valid TOML" in proxy.running.stderr or not proxy.error())
    assert len(stub.received) == 1


def test_wrong_usage_is_said_in_a_sentence(commands: Commands, tmp_path: Path) -> None:
    policy = policy_file(tmp_path)
    for arguments, says in (
        (("http://host:1", "--policy", policy), "Plain HTTP is refused"),
        (("https://host/other", "--policy", policy), "must be https://HOST:PORT"),
        (("https://h", "--policy", policy, "--reverify-seconds", 0), "must be more than 0"),
    ):
        result = commands.run("proxy", *arguments, "--port", 0)
        assert result.status == 2
        assert says in result.stderr
