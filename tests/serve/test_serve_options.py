"""Who is let in, as whom, and what the server says of where it listens."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from serve_client import KEY, OTHER_KEY

from tsqp.errors import UsageError
from tsqp.serve.middleware import Gate, Keys
from tsqp.serve.options import ServeOptions, read_api_keys

BROKER = {
    "attest": "simulated", "broker_url": "https://192.0.2.1:1", "broker_key": "ab" * 32,
    "fetch_api_keys": "keys",
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    file = tmp_path / "any.pem"
    file.write_text("any")
    return {"ssl_certfile": file, "ssl_keyfile": file}


def test_each_key_is_a_tenant_and_no_keys_are_nobody() -> None:
    keys = Keys((KEY, OTHER_KEY))
    tenants = {keys.tenant(f"Bearer {key}") for key in (KEY, OTHER_KEY)}
    assert len(tenants) == 2 and "" not in tenants
    assert not any(key in tenant for key in (KEY, OTHER_KEY) for tenant in tenants)
    assert keys.tenant(f"bearer {KEY}") in tenants
    for wrong in ("", "Bearer", f"Bearer {KEY}{OTHER_KEY}", f"Basic {KEY}", KEY):
        assert keys.tenant(wrong) is None
    assert Keys(()).tenant("Bearer anything") == ""


def test_the_app_is_told_whose_request_it_is() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"]["tenant"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(_: Any) -> None:
        pass

    for key in (KEY, OTHER_KEY, KEY):
        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        asyncio.run(Gate(app, ServeOptions(api_keys=(KEY, OTHER_KEY)))(scope, receive, send))
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"host": "::1"}, ""),
        ({"host": "localhost"}, ""),
        ({"host": "0.0.0.0", "uds": Path("a.sock")}, ""),
        ({"host": "0.0.0.0", "api_keys": ["a"]}, "without TLS"),
        ({"host": "gpu.example"}, "without TLS, so prompts and answers travel in clear, and "),
        ({"host": "::", "tls": True}, "without API keys, so everybody may use it."),
        ({"host": "::", "tls": True, "api_keys": ["a"]}, ""),
    ],
)
def test_a_server_that_others_can_reach_says_what_it_lacks(
    options: dict[str, Any], said: str, files: dict[str, Path]
) -> None:
    tls = files if options.pop("tls", False) else {}
    exposure = ServeOptions(**options, **tls).exposure
    assert said in exposure
    assert bool(said) == bool(exposure)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"max_num_seqs": 0},
        {"max_num_queued_reqs": -1},
        {"max_model_len": 1},
        {"shutdown_timeout": -1},
        {"shutdown_timeout": float("nan")},
        {"api_keys": ["a\nb"]},
        {"api_keys": [""]},
        {"root_path": "a"},
        {"ssl_keyfile": Path("key.pem")},
        BROKER | {"attest": None},
        {"attest": "simulated", "broker_url": "https://192.0.2.1:1", "broker_key": "ab" * 32},
        {"attest": "simulated", "fetch_api_keys": "keys"},
        BROKER | {"broker_key": "ab"},
        BROKER | {"broker_url": "http://192.0.2.1:1"},
        BROKER | {"broker_url": "https://192.0.2.1:99999"},
        BROKER | {"broker_url": "https://a@192.0.2.1:1"},
        BROKER | {"broker_url": "https://192.0.2.1:1/v1"},
        BROKER | {"fetch_api_keys": "../keys"},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServeOptions(**wrong)


def test_keys_of_all_places_are_read_once_each(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n")
    file.chmod(0o640)
    assert read_api_keys(["two", "three"], file) == ("two", "three", "one")
    file.write_text("\n")
    with pytest.raises(UsageError, match="no API key"):
        read_api_keys([], file)
