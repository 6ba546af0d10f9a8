"""What a client makes of servers that fail, are something else, or are hostile."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import pytest
from plain_http import STREAM_HEAD, PlainServer, event, models, reply, said

from tsqp.cli.console import for_terminal
from tsqp.client import chat as chat_module
from tsqp.client.chat import ChatServer
from tsqp.client.server_url import open_transport, parse_server_url
from tsqp.errors import PromptError, ServerError, UsageError

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
CHUNKED = STREAM_HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked")
CUT_BY_LENGTH = STREAM_HEAD.replace(b"Connection: close", b"Content-Length: 9999")

Reply = bytes | Iterable[bytes]


@pytest.fixture
def plain() -> Iterator[PlainServer]:
    server = PlainServer()
    yield server
    server.close()


def connect(server: PlainServer, **options: object) -> ChatServer:
    url = parse_server_url(server.url)
    return ChatServer(url, open_transport(url), **options)


def ask(server: PlainServer, answer: Reply, **options: object) -> str:
    """The text of an answer."""
    server.replies[CHAT] = answer
    with connect(server, **options) as client:
        return "".join(piece.text for piece in client.stream("one", HELLO, {}))


def refused(body: bytes, status: str, more: str = "") -> bytes:
    return reply(b'{"error": %s}' % body, status, more=more)


def test_an_answer_comes_in_pieces_with_its_reason_and_its_numbers(plain: PlainServer) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    plain.replies[CHAT] = (
        STREAM_HEAD + b": a comment\r\n\r\n" + said("Good ") + said("day", "length")
        + event(usage) + event("[DONE]")
    )  # fmt: skip
    with connect(plain, api_key="the-key") as client:
        pieces = list(client.stream("one", HELLO, {"top_k": 3}))
    assert [piece.text for piece in pieces] == ["Good ", "day", ""]
    assert [piece.finish_reason for piece in pieces] == [None, "length", None]
    assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (5, 2)
    [asked] = plain.asked
    assert asked.headers["authorization"] == "Bearer the-key"
    assert asked.json == {
        "model": "one", "messages": HELLO, "stream": True,
        "stream_options": {"include_usage": True}, "top_k": 3,
    }  # fmt: skip


def test_a_stream_without_the_last_event_is_whole_if_it_has_a_reason(plain: PlainServer) -> None:
    assert ask(plain, STREAM_HEAD + said("all", "stop")) == "all"


def test_closing_an_answer_hangs_up(plain: PlainServer) -> None:
    plain.stays_open = True
    plain.replies[CHAT] = STREAM_HEAD + said("first")
    with connect(plain) as client:
        pieces = client.stream("one", HELLO, {})
        assert next(pieces).text == "first"
        assert not plain.hung_up.is_set()
        pieces.close()
        assert plain.hung_up.wait(60)


FAILURES: dict[str, tuple[Reply, type[Exception], str]] = {
    "nothing at all": (b"", ServerError, "does not speak HTTP as it should"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n", ServerError, "does not speak HTTP as it should"),
    "a page": (reply(b"<html>", kind="text/html"), ServerError, "does not stream"),
    "one whole answer": (reply(b'{"choices": []}'), ServerError, "does not stream"),
    "cut off after a piece": (STREAM_HEAD + said("a"), ServerError, "was cut off"),
    "cut off within a chunk": (CHUNKED + b"FFFF\r\n" + said("a"), ServerError, "was cut off"),
    "cut off before its length": (CUT_BY_LENGTH + said("a"), ServerError, "was cut off"),
    "done without a reason": (STREAM_HEAD + event("[DONE]"), ServerError, "was cut off"),
    "not JSON": (STREAM_HEAD + event("{"), ServerError, "as OpenAI's interface has it"),
    "a list": (STREAM_HEAD + event([1]), ServerError, "as OpenAI's interface has it"),
    "no choices": (STREAM_HEAD + event({}), ServerError, "as OpenAI's interface has it"),
    "text that is a number": (
        STREAM_HEAD + event({"choices": [{"delta": {"content": 5}}]}),
        ServerError,
        "as OpenAI's interface has it",
    ),
    "deep nesting": (STREAM_HEAD + event("[" * 100_000), ServerError, "as OpenAI's interface"),
    "half a character": (
        STREAM_HEAD + event(r'{"choices": [{"delta": {"content": "\ud83d"}}]}'),
        ServerError,
        "as OpenAI's interface has it",
    ),
    "an error within": (
        STREAM_HEAD + said("a") + event({"error": {"message": "The worker failed."}}),
        ServerError,
        "could not finish the answer: The worker failed.",
    ),
    "compressed": (
        reply(b"", kind="text/event-stream", more="Content-Encoding: gzip\r\n"),
        ServerError,
        "compresses",
    ),
    "a redirect": (
        reply(b"", "307 Moved", more="Location: http://127.0.0.2/\r\n"),
        ServerError,
        "redirects elsewhere",
    ),
    "busy": (
        refused(b'{"message": "The queue is full."}', "503 Busy", "Retry-After: 7\r\n"),
        ServerError,
        "cannot answer now: The queue is full; try again in 7 seconds.",
    ),
    "busy for an unreadable time": (
        refused(b"{}", "429 Busy", "Retry-After: \x1b[2J\r\n"),
        ServerError,
        "cannot answer now; try again later.",
    ),
    "no such model": (
        refused(b'{"message": "No.", "code": "model_not_found"}', "404 No"),
        ServerError,
        "has no such model: No; leave MODEL out",
    ),
    "no such path": (reply(b"<html>", "404 No"), ServerError, "no OpenAI-compatible server"),
    "a long conversation": (
        refused(b'{"message": "x", "code": "context_length_exceeded"}', "400 Bad"),
        PromptError,
        "too long for the model's context",
    ),
    "a wrong field": (
        refused(rb'{"message": "\u001b[31mtop_k is\nwrong."}', "400 Bad"),
        PromptError,
        "refuses the request: \ufffd[31mtop_k is wrong.",
    ),
    "an error in words": (refused(b'"no"', "422 Bad"), PromptError, "refuses the request: no."),
    "a failure": (reply(b"oops" * 100_000, "500 Bad"), ServerError, "with status 500."),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_sentence(plain: PlainServer, name: str) -> None:
    answer, kind, sentence = FAILURES[name]
    with pytest.raises(kind) as caught:
        ask(plain, answer)
    message = str(caught.value)
    assert sentence in message
    assert message.endswith(".") and len(message) < 500
    assert message.isprintable()


def test_a_prompt_is_not_sent_where_a_redirect_points(plain: PlainServer) -> None:
    other = PlainServer({CHAT: STREAM_HEAD + said("mine now", "stop")})
    with pytest.raises(ServerError, match="redirects elsewhere"):
        ask(plain, reply(b"", "307 Moved", more=f"Location: {other.url}{CHAT}\r\n"))
    assert other.asked == []
    other.close()


@pytest.mark.parametrize(("key", "says"), [("", "wants an API key"), ("x", "refuses the API key")])
def test_a_refused_key_is_not_shown(plain: PlainServer, key: str, says: str) -> None:
    with pytest.raises(ServerError, match=says) as caught:
        ask(plain, refused(b"{}", "401 Unauthorized"), api_key=key and "key-of-nobody")
    assert "key-of-nobody" not in str(caught.value)


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "a line": (STREAM_HEAD, b"x" * 65536),
    "an event": (STREAM_HEAD, b"data: xxxxxxxx\n" * 4096),
    "comments": (STREAM_HEAD, b": x\n" * 4096),
    "pieces": (STREAM_HEAD, said("word ") * 512),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 4096),
    "a header": (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 65536),
    "an error": (b"HTTP/1.1 500 Bad\r\n\r\n", b"x" * 65536),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_hung_up_on(
    plain: PlainServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "MAX_STREAM", 2**20)
    begin, more = ENDLESS[name]
    with pytest.raises(ServerError):
        ask(plain, chain([begin], repeat(more)))
    assert plain.hung_up.wait(60)


def test_a_server_that_falls_silent_is_given_up(plain: PlainServer) -> None:
    plain.stays_open = True
    with pytest.raises(ServerError, match="sent nothing for too long"):
        ask(plain, STREAM_HEAD + said("a"), silence_s=0.2)


def test_the_models_of_a_server_are_listed(plain: PlainServer) -> None:
    plain.replies[MODELS] = models()
    with connect(plain) as client:
        assert client.models() == ["one", "two"]


@pytest.mark.parametrize(
    "answer",
    [
        reply(b"<html>", kind="text/html"),
        reply(b'{"data": []}'),
        reply(b'{"data": [{"id": ""}]}'),
        reply(rb'{"data": [{"id": "a\u001b[2J"}]}'),
        reply(b'{"data": [{"id": "%s"}]}' % (b"a" * 1000)),
        reply(b'{"data": 5}'),
        chain([b"HTTP/1.1 200 OK\r\n\r\n"], repeat(b"[" * 65536)),
    ],
    ids=["page", "none", "empty", "control", "long", "wrong", "endless"],
)  # fmt: skip
def test_a_list_of_models_that_is_wrong_is_one_sentence(plain: PlainServer, answer: Reply) -> None:
    plain.replies[MODELS] = answer
    with connect(plain) as client, pytest.raises(ServerError, match=r"^The (server|answer) .*\.$"):
        client.models()


def test_no_proxy_and_no_password_file_of_the_environment_is_used(
    plain: PlainServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = PlainServer()
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    plain.replies[MODELS] = models()
    with connect(plain) as client:
        client.models()
    assert (len(plain.asked), len(proxy.asked)) == (1, 0)
    assert "authorization" not in plain.asked[0].headers
    proxy.close()


@pytest.mark.parametrize(
    ("text", "base", "is_exposed"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1", False),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", False),
        ("http://[::1]:8000/", "http://[::1]:8000/v1", False),
        ("http://gpu-host:8000", "http://gpu-host:8000/v1", True),
        ("http://localhost.example", "http://localhost.example/v1", True),
        ("http://10.0.0.1/llm/v1", "http://10.0.0.1/llm/v1", True),
        ("HTTPS://host", "https://host/v1", False),
    ],
)
def test_an_address_is_read_with_or_without_its_version(
    text: str, base: str, is_exposed: bool
) -> None:
    url = parse_server_url(text)
    assert (url.base, url.is_exposed) == (base, is_exposed)


@pytest.mark.parametrize(
    "text",
    [
        "", "host:8000", "/path", "ftp://host", "http://", "http://a:b@host", "http://host/?key=1",
        "http://host/#a", "http://host:99999", "http://host:0", "http://ho st", "http://[::1",
        "\x00",
    ],
)  # fmt: skip
def test_what_is_not_the_address_of_a_server_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--url must "):
        parse_server_url(text)


def test_a_text_for_a_terminal_keeps_every_letter_and_no_control_character() -> None:
    plain = "naïve 日本\u3000語\tعربي 👩\u200d💻\n"
    assert for_terminal(plain) == plain
    assert for_terminal("a\r\nb") == "a\nb"
    shown = for_terminal("\x1b]0;title\x07\x1b[2J\x9b31m\x08\x7f\u202eabc\u2066")
    assert shown == "\ufffd]0;title\ufffd\ufffd[2J\ufffd31m\ufffd\ufffd\ufffdabc\ufffd"
