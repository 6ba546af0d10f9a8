"""What was computed for a request is reused for the same key and `cache_salt` only."""

from collections.abc import Callable

import pytest
from serve_client import OTHER_KEY, Reply, Server

Ask = Callable[[Server, str, str], Reply]
TEXT = "The same long beginning of a prompt, for "


def chat(server: Server, text: str, salt: str) -> Reply:
    return server.chat(text, max_tokens=1, cache_salt=salt)


def completion(server: Server, text: str, salt: str) -> Reply:
    return server.complete(text, max_tokens=1, cache_salt=salt)


@pytest.mark.parametrize("ask", [chat, completion])
def test_a_prompt_is_reused_for_its_own_key_and_salt_only(server: Server, ask: Ask) -> None:
    def reused(server: Server, salt: str) -> bool:
        reply = ask(server, f"{TEXT}{ask.__name__}", salt)
        assert reply.status == 200
        return bool(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    other = Server(server.port, OTHER_KEY)
    assert not reused(server, "one salt")
    assert reused(server, "one salt")
    assert not reused(server, "another salt")
    assert not reused(other, "one salt")
    assert reused(other, "one salt")
