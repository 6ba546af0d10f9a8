"""Nothing of a prompt leaves the client unless the peer's key is the attested one."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from attested_stub import (
    POLICY,
    PROMPT,
    AttestedStub,
    Identity,
    changed_policy,
    make_evidence,
)
from openai import OpenAI

from tsqp.client.attested_tls import KeyChanged, pinned_context
from tsqp.client.fetch import fetch_evidence, origin_of
from tsqp.client.policy import Policy
from tsqp.client.verified import connect, verify_url
from tsqp.errors import AttestationError, UsageError


@pytest.fixture
def stub() -> Iterator[AttestedStub]:
    with AttestedStub() as server:
        yield server


def ask(http: httpx2.Client, stub: AttestedStub) -> httpx2.Response:
    return http.post(f"{stub.url}/v1/chat/completions", json={"prompt": PROMPT})


def test_a_verified_server_gets_the_prompt(stub: AttestedStub) -> None:
    with connect(stub.url, POLICY) as http:
        assert ask(http, stub).status_code == 200
    assert PROMPT.encode() in stub.received[0]


def test_openai_python_talks_over_verified_connections(stub: AttestedStub) -> None:
    with connect(f"{stub.url}/v1", POLICY) as http:
        client = OpenAI(base_url=f"{stub.url}/v1", api_key="k", http_client=http)
        assert list(client.models.list()) == []


@pytest.mark.parametrize(
    "lie",
    [
        {"public_key": b"k" * 32},
        {"nonce": b"n" * 32},
        {"privacy": "open"},
        {"configuration": b"c" * 32},
    ],
)
def test_a_server_whose_evidence_is_wrong_gets_nothing(
    stub: AttestedStub, lie: dict[str, object]
) -> None:
    stub.answer = lambda key, nonce: make_evidence(
        **({"public_key": key, "nonce": nonce} | lie)  # type: ignore[arg-type]
    ).to_json()
    with pytest.raises(AttestationError, match="The server is not verified"):
        connect(stub.url, POLICY)
    assert stub.received == []


def test_old_evidence_is_refused(stub: AttestedStub) -> None:
    first: list[bytes] = []

    def replay(key: bytes, nonce: bytes) -> bytes:
        first.append(make_evidence(key, nonce).to_json())
        return first[0]

    stub.answer = replay
    assert verify_url(stub.url, POLICY).verdict.accepted
    assert [check.name for check in verify_url(stub.url, POLICY).verdict.failures] == ["nonce"]


@pytest.mark.parametrize("with_authority", [False, True])
def test_a_man_in_the_middle_with_a_valid_web_certificate_gets_nothing(
    stub: AttestedStub, tmp_path: Path, with_authority: bool
) -> None:
    authority = Identity()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    cacert = tmp_path / "ca.pem" if with_authority else None
    with AttestedStub(Identity(authority)) as man:
        # He passes the question on to the real server, and its genuine answer back.
        def relay(_: bytes, nonce: bytes) -> bytes:
            return httpx2.get(
                f"{stub.url}/.well-known/tsqp-attestation?nonce={nonce.hex()}", verify=False
            ).content

        man.answer = relay
        found = verify_url(man.url, POLICY, cacert=cacert)
        assert [check.name for check in found.verdict.failures] == ["TLS key"]
        with pytest.raises(AttestationError):
            connect(man.url, POLICY, cacert=cacert)
        assert man.received == []
    assert stub.received == []


def test_a_server_that_another_replaces_gets_nothing(stub: AttestedStub) -> None:
    with connect(stub.url, POLICY) as http:
        assert ask(http, stub).status_code == 200
        stub.received.clear()
        stub.identity = Identity()
        http._transport.close()  # so that the next request needs a new connection
        with pytest.raises(KeyChanged, match="Nothing was sent"):
            ask(http, stub)
        client = OpenAI(base_url=f"{stub.url}/v1", api_key="k", http_client=http, max_retries=1)
        with pytest.raises(KeyChanged):
            client.completions.create(model="m", prompt=PROMPT)
    assert stub.received == []


def test_every_connection_of_a_pool_is_checked(stub: AttestedStub) -> None:
    found = verify_url(stub.url, POLICY)
    stub.identity = Identity()

    async def many() -> list[object]:
        context = pinned_context(found.public_key)
        async with httpx2.AsyncClient(verify=context, trust_env=False) as http:
            asks = [http.post(f"{stub.url}/v1/x", content=PROMPT) for _ in range(20)]
            return await asyncio.gather(*asks, return_exceptions=True)

    assert {type(each) for each in asyncio.run(many())} == {KeyChanged}
    assert stub.received == []


def test_requests_to_other_servers_are_refused(stub: AttestedStub) -> None:
    with AttestedStub(stub.identity) as other, connect(stub.url, POLICY) as http:
        for url in (other.url, f"http://127.0.0.1:{stub.port}", "https://example.org"):
            with pytest.raises(AttestationError, match="another server"):
                http.post(f"{url}/v1/chat/completions", json={"prompt": PROMPT})
        assert other.received == []


def test_an_authority_can_be_required_too(tmp_path: Path) -> None:
    authority = Identity()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "other.pem").write_bytes(Identity().pem)
    with AttestedStub(Identity(authority)) as server:
        assert verify_url(server.url, POLICY, cacert=tmp_path / "ca.pem").verdict.accepted
        with pytest.raises(AttestationError, match="cannot be reached"):
            verify_url(server.url, POLICY, cacert=tmp_path / "other.pem")
        with pytest.raises(UsageError, match="cannot be used as --cacert"):
            verify_url(server.url, POLICY, cacert=tmp_path / "absent.pem")


@pytest.mark.parametrize(
    ("status", "headers", "body", "says"),
    [
        (302, {"Location": "https://127.0.0.1:1/"}, b"", "redirects, which is refused"),
        (307, {"Location": "/elsewhere"}, b"", "redirects, which is refused"),
        (404, {}, b"", "start it with `tsqp serve --attest`"),
        (503, {}, b"", "loading or busy"),
        (500, {}, b"", "answered with status 500"),
        (200, {}, b"{", "not valid JSON"),
        (200, {}, b"x" * 100_000, "server's evidence has more than 65,536 bytes"),
        (200, {}, b"[]", "must be an object"),
        (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b" + b"0" * 100, "not valid JSON"),
    ],
)
def test_answers_without_evidence_are_refused(
    stub: AttestedStub, status: int, headers: dict[str, str], body: bytes, says: str
) -> None:
    stub.status, stub.headers, stub.answer = status, headers, lambda *_: body
    with pytest.raises(AttestationError, match=says):
        verify_url(stub.url, POLICY)


def test_a_server_that_never_ends_its_answer_is_given_up(stub: AttestedStub) -> None:
    stub.answer = lambda *_: (stub.streaming.wait(20) and b"") or b""
    with pytest.raises(AttestationError, match=r"within 0\.5 seconds|did not answer in time"):
        asyncio.run(fetch_evidence(origin_of(stub.url), total_s=0.5))


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(AttestationError, match="cannot be reached"):
        verify_url("https://127.0.0.1:1", POLICY)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000", "127.0.0.1:8000", "https://", "https://user:pw@host",
        "https://host/v1/chat", "https://host?x=1", "https://host/#x", "ftp://host", "",
        "https://host:99999",
    ],
)  # fmt: skip
def test_urls_other_than_of_https_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        origin_of(url)


def test_the_verdict_of_a_server_has_all_demands(stub: AttestedStub) -> None:
    policy: Policy = changed_policy(configuration={"options": {"threads": 2}})
    verdict = verify_url(stub.url, policy).verdict
    assert verdict.accepted
    names = {check["name"] for check in json.loads(verdict.json())["checks"]}
    assert {"TLS key", "nonce", "configuration.options.threads"} <= names
