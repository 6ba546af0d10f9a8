"""Requests take a place before anything is done for them, and leave it with their client."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_client import DEADLINE_S, KEY, OTHER_KEY, Server
from serve_here import serving

from tsqp import AsyncLLM
from tsqp.errors import PromptError
from tsqp.serve.options import ServeOptions
from tsqp.tee.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
ASKED: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/responses": {"input": "Hello"},
    "/v1/completions": {"prompt": "Hello"},
    "/tokenize": {"messages": HELLO},
    "/detokenize": {"tokens": [1, 2]},
}
PLACES = 3


class Work:
    """What the text threads do: nothing until they are let go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked = 0

    def wait(self, *_: object, **__: object) -> None:
        self.asked += 1
        assert self.go_on.wait(DEADLINE_S)
        raise PromptError("there is no text")


@pytest.fixture(scope="module")
def small_llm(model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(
        str(model), privacy="tee", threads=1, max_num_seqs=1, max_num_queued_reqs=PLACES - 1
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def small_server(small_llm: AsyncLLM) -> Iterator[Server]:
    options = ServeOptions(max_num_seqs=1, max_num_queued_reqs=PLACES - 1)
    with serving(options, small_llm, texts=PLACES) as server:
        yield server


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    work = Work()
    for name in ("encode", "encode_chat", "decode"):
        monkeypatch.setattr(Tokenizer, name, work.wait)
    yield work
    work.go_on.set()


def begin(server: Server, path: str) -> http.client.HTTPConnection:
    connection = server.connect()
    body = json.dumps(ASKED[path])
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("path", ASKED)
def test_a_place_is_taken_before_the_tokenizing_and_left_when_the_client_hangs_up(
    small_server: Server, work: Work, path: str
) -> None:
    def is_refused() -> bool:
        connection = begin(small_server, path)
        try:
            connection.sock.settimeout(0.2)
            reply = connection.getresponse()
            assert (reply.status, reply.getheader("retry-after")) == (503, "1")
            assert json.loads(reply.read())["error"]["code"] == "queue_full"
            return True
        except TimeoutError:
            return False  # it waits for the text threads
        finally:
            connection.close()

    connections = [begin(small_server, path) for _ in range(PLACES)]
    small_server.settles(is_refused)
    connections.pop().close()
    small_server.settles(lambda: not is_refused())
    assert work.asked <= 2  # as many as there are threads: the other is not even looked at
    work.go_on.set()
    for connection in connections:
        assert connection.getresponse().status == 400
        connection.close()


def test_one_key_does_not_keep_another_from_tokenizing(model: Path, work: Work) -> None:
    options = ServeOptions(api_keys=(KEY, OTHER_KEY), max_num_seqs=1, max_num_queued_reqs=8)
    llm = AsyncLLM(
        str(model), privacy="tee", threads=1, max_num_seqs=1, max_num_queued_reqs=8,
        share_queue=options.is_shared,
    )  # fmt: skip
    try:
        with serving(options, llm) as server:
            replies: list[int] = []

            def ask(key: str) -> None:
                replies.append(Server(server.port, key).chat().status)

            threads = [threading.Thread(target=ask, args=(KEY,)) for _ in range(20)]
            for thread in threads:
                thread.start()
            server.settles(lambda: len(replies) == 20 - 5)  # one may run, and four wait
            assert set(replies) == {503}
            other = threading.Thread(target=ask, args=(OTHER_KEY,))
            other.start()
            work.go_on.set()
            for thread in (*threads, other):
                thread.join(DEADLINE_S)
            assert replies.count(503) == 15 and replies.count(400) == 6
    finally:
        llm.close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that wrote the probabilities of more than a few tokens."""
    import tsqp.serve.chat
    import tsqp.serve.completions

    names: list[str] = []

    def note(module: Any, name: str, place: int) -> None:
        write = getattr(module, name)

        def noted(*given: Any) -> Any:
            if len(given[place]) > 100:
                names.append(threading.current_thread().name)
            return write(*given)

        monkeypatch.setattr(module, name, noted)

    note(tsqp.serve.completions, "completion_logprobs", 1)
    note(tsqp.serve.chat, "chat_logprobs", 1)
    return names


@pytest.mark.parametrize("stream", [True, False])
def test_many_probabilities_are_not_written_in_the_event_loop(
    small_server: Server, threads: list[str], stream: bool
) -> None:
    long = "a" * 1000
    echo = small_server.complete(long, echo=True, logprobs=5, max_tokens=1, stream=stream)
    assert echo.status == 200
    if not stream:
        assert small_server.chat(max_tokens=150, logprobs=True, ignore_eos=True).status == 200
    assert len(threads) == (1 if stream else 2)
    assert all(name.startswith("asyncio_") for name in threads)


def test_names_of_many_tokens_are_not_looked_up_in_the_event_loop(
    small_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tsqp.serve.tokens

    names: set[str] = set()
    name_of = tsqp.serve.tokens.name_of

    def noted(*given: Any) -> str:
        names.add(threading.current_thread().name)
        return name_of(*given)

    monkeypatch.setattr(tsqp.serve.tokens, "name_of", noted)
    found = small_server.ask("/tokenize", {"prompt": "Hello", "return_token_strs": True}).json
    assert "".join(found["token_strs"]) == "Hello"
    assert names and "http" not in names
