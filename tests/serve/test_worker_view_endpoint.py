"""`/v1/tsqp/view`: only with --show-worker-view, only for the same key, and never in a log."""

from base64 import b64decode
from pathlib import Path

from protocol_helpers import Commands
from serve_client import OTHER_KEY, Reply, Server
from serve_models import HIDDEN, LAYERS

CANARY = "CANARYcornflower3391"
ABSENT = "There is nothing to show of this request, or not any more."


def view(server: Server, reply: Reply, **headers: str) -> Reply:
    return server.ask(f"/v1/tsqp/view/{reply.headers['x-request-id']}", headers=headers)


def test_a_view_has_the_tokens_that_the_worker_was_asked_about(watched_server: Server) -> None:
    wanted = {"max_tokens": 3, "ignore_eos": True, "temperature": 0}
    replies = [watched_server.chat("Hello", cache_salt=salt, **wanted) for salt in ("a", "b")]
    tokens = replies[0].json["usage"]["total_tokens"] - 1  # the last one is only chosen
    found = [view(watched_server, reply) for reply in replies]
    assert found[0].headers["cache-control"] == "no-store"
    shown, again = (each.json for each in found)
    assert (shown["layer"], shown["group"]) == ((LAYERS - 1) // 2, "o")
    assert (shown["rows"], shown["columns"]) == (tokens, HIDDEN)
    assert len(b64decode(shown["masked"])) == len(b64decode(shown["plain"])) == tokens * HIDDEN
    assert again["plain"] == shown["plain"]
    assert again["masked"] != shown["masked"]


def test_a_view_is_for_the_key_of_its_request_only(watched_server: Server) -> None:
    reply = watched_server.chat()
    stranger = view(watched_server, reply, Authorization=f"Bearer {OTHER_KEY}")
    unknown = watched_server.ask("/v1/tsqp/view/none")
    assert stranger.status == unknown.status == 404
    assert stranger.error == unknown.error
    assert unknown.error["message"] == ABSENT
    assert unknown.error["code"] == "no_view"
    assert view(watched_server, reply, Authorization="Bearer wrong").status == 401
    assert view(watched_server, reply, Authorization="").status == 401
    assert view(watched_server, reply).status == 200


def test_a_request_id_that_two_keys_use_has_a_view_for_each(watched_server: Server) -> None:
    theirs = {"Authorization": f"Bearer {OTHER_KEY}", "X-Request-Id": "the-same"}
    body = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True, "cache_salt": "here"}
    long = {**body, "prompt": [4] * 9}
    path = "/v1/tsqp/view/the-same"
    watched_server.ask("/v1/completions", body, headers={"X-Request-Id": "the-same"})
    watched_server.ask("/v1/completions", long, headers=theirs)
    assert watched_server.ask(path).json["rows"] == 4
    assert watched_server.ask(path, headers=theirs).json["rows"] == 10


def test_a_server_shows_nothing_unless_it_was_asked_to(server: Server) -> None:
    found = view(server, server.chat())
    assert found.status == 404
    assert found.error["message"] == "This server does not show what workers receive."
    assert server.ask("/v1/tsqp/status").json["worker_view"] is False


def test_a_server_that_shows_it_says_so(watched_server: Server) -> None:
    [warning] = [line for line in watched_server.log().splitlines() if "worker-view" in line]
    assert "whoever holds the API key of the request" in warning
    assert watched_server.ask("/v1/tsqp/status").json["worker_view"] is True


def test_nothing_that_was_shown_is_in_a_log(
    watched_server: Server, serve_commands: Commands
) -> None:
    shown = view(watched_server, watched_server.chat(CANARY)).json
    assert watched_server.ask(f"/v1/tsqp/view/{CANARY}").status == 404
    calls = (serve_commands.folder / "calls.jsonl").read_text()
    metrics = watched_server.ask("/metrics").body.decode()
    log = watched_server.log()
    assert "path=/v1/tsqp/view/{request_id}" in log
    for place in (log, calls, metrics):
        for secret in (CANARY, shown["masked"][:24], shown["plain"][:24]):
            assert secret not in place
    written = [path for path in Path(serve_commands.folder).rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
