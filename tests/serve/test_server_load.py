"""`tsqp bench serve` measures a server as a client sees it."""

import json

import pytest
from protocol_helpers import Commands
from serve_client import KEY, Server
from serve_process import begin

from tsqp.bench.numbers import parse_numbers
from tsqp.errors import UsageError


def test_a_server_with_masks_is_measured(model: object, commands: Commands) -> None:
    _, server = begin(commands, model, "--worker", "local", "--pad-memory", 0.001)
    keys = commands.folder / "keys"
    keys.write_text(KEY)
    keys.chmod(0o600)
    out = commands.folder / "result.json"
    url = f"http://127.0.0.1:{server.port}"
    result = commands.run(
        "bench", "serve", "--url", url, "--api-key-file", keys, "--streams", "1,3", "--rounds", 2,
        "--prompt-tokens", 5, "--new-tokens", 6, "--long-tokens", 400, "--out", out,
    )  # fmt: skip
    assert result.status == 0, result.stderr
    found = json.loads(out.read_text())
    assert found["server"]["privacy"] == "pad"
    assert [load["streams"] for load in found["loads"]] == [1, 3]
    for load in found["loads"]:
        assert load["tokens_per_s"]["least"] > 0
        assert 0 < load["gap_s"]["median"] <= load["gap_p99_s"]["median"]
        assert 0 < load["http_share"]["median"] < 1
        assert 0 <= load["inline_share"]["median"] <= 1
    assert set(found["first_token_s"]) == {"short_alone", "short_beside_long", "long"}
    assert found["rounds"] == 2
    assert "÷ one stream" in result.stderr


def test_without_a_server_and_with_a_wrong_key_it_is_one_sentence(
    server: Server, commands: Commands
) -> None:
    for arguments, said in (
        (["--url", "http://127.0.0.1:9"], "No server answers at --url"),
        (["--url", f"http://127.0.0.1:{server.port}"], "status 401"),
    ):
        result = commands.run("bench", "serve", *arguments)
        assert result.status == 1
        assert said in result.error
    assert commands.run("bench", "serve", "--url", "ftp://a").status == 2


@pytest.mark.parametrize("text", ["", "0", "1,a", "2000"])
def test_numbers_of_streams_are_checked(text: str) -> None:
    with pytest.raises(UsageError, match="--streams"):
        parse_numbers(text, "--streams", 1024)
    assert parse_numbers("16, 1,1", "--streams", 1024) == [1, 16]
