"""A stream with `echo` says the same as a whole answer."""

from typing import Any

import pytest
from serve_client import Server

OPTIONS = {"include_usage": True, "continuous_usage_stats": True}
PROMPTS = ["Hello €", "another one"]


def joined(events: list[Any], index: int) -> dict[str, Any]:
    """One answer of a stream, put together."""
    mine = [each for event in events for each in event["choices"] if each["index"] == index]
    found: dict[str, Any] = {
        "index": index,
        "text": "".join(each["text"] for each in mine),
        "finish_reason": mine[-1]["finish_reason"],
        "logprobs": None,
        "token_ids": [each for piece in mine for each in piece["token_ids"]],
    }
    rated = [each["logprobs"] for each in mine if each["logprobs"] is not None]
    if rated:
        found["logprobs"] = {
            name: [item for each in rated for item in each[name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
    return found


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8]]], ids=["texts", "ids"])
def test_a_streamed_echo_adds_up_to_the_whole_answer(
    server: Server, prompts: object, logprobs: int | None, max_tokens: int
) -> None:
    wanted = {
        "echo": True, "logprobs": logprobs, "max_tokens": max_tokens, "n": 2, "seed": 3,
        "return_token_ids": True, "cache_salt": f"{prompts} {logprobs} {max_tokens}",
    }  # fmt: skip
    server.complete(prompts, **wanted)  # the prompts are reused from now on, or never
    whole = server.complete(prompts, **wanted).json
    events = server.complete(prompts, **wanted, stream=True, stream_options=OPTIONS).events
    assert [joined(events, index) for index in range(4)] == whole["choices"]
    assert events[-1]["usage"] == whole["usage"]
    if max_tokens == 0:
        assert whole["usage"]["completion_tokens"] == 0
        assert {each["finish_reason"] for each in whole["choices"]} == {"length"}
        assert all(event["usage"]["completion_tokens"] == 0 for event in events)
        assert all(each["token_ids"] == [] for each in whole["choices"])


def test_an_echo_of_nothing_more_is_length_even_where_the_answer_would_end(server: Server) -> None:
    wanted = {"echo": True, "max_tokens": 0, "logit_bias": {"5": 100}, "stop_token_ids": [5]}
    events = server.complete("Hello", **wanted, stream=True).events
    assert [each["finish_reason"] for event in events for each in event["choices"]] == ["length"]
    assert "".join(each["text"] for event in events for each in event["choices"]) == "Hello"
