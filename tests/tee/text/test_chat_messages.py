"""What a conversation may be, and what is said of anything else."""

from typing import Any

import pytest

from tsqp.errors import PromptError
from tsqp.tee.text.chat_messages import MAX_DEPTH, check_messages, check_tools


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("Hello", "A conversation is a list"),
        (b"Hello", "A conversation is a list"),
        ({"role": "user"}, "A conversation is a list"),
        (None, "A conversation is a list"),
        ([], "The conversation is empty"),
        (["Hello"], "message 1 is not an object"),
        ([[{"role": "user", "content": "x"}]], "message 1 is not an object"),
        ([{"content": "x"}], "Message 1 of the conversation has no role"),
        ([{"role": 3}], "has no role"),
        ([{"role": "user", "content": 5}], "not text, text parts, an object or null"),
        ([{"role": "user", "content": True}], "not text, text parts, an object or null"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "of type image_url, but TSQP"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "of type input_audio"),
        ([{"role": "user", "content": [{"type": "cinnamon"}]}], "a part that is not"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part that is not"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part that is not"),
        ([{"role": "user", "content": ["x"]}], "a part that is not"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "us\ud800er", "content": "x"}], "not valid Unicode"),
        ([{"role": "user", "content": "x", "name": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": "x", "a": [{"\udfff": 1}]}], "not valid Unicode"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "a key that is not a text"),
        ([{"role": "user", "content": "x", "extra": object()}], "of type object; it may hold JSON"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "of type set; it may hold JSON"),
        ([{"role": "user", "content": "x", "extra": 10**100}], "a number that is too large"),
        ([{"role": "user", "content": "x"}, {"role": None}], "Message 2 of the conversation"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence) as refused:
        check_messages(messages)
    assert "cinnamon" not in str(refused.value)
    assert refused.value.__context__ is None


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_deep_nesting_is_refused() -> None:
    fits = [{"role": "user", "content": "x", "extra": nested(MAX_DEPTH - 1)}]
    assert check_messages(fits) == fits
    for depth in (MAX_DEPTH, 100_000):
        with pytest.raises(PromptError, match="levels deep"):
            check_messages([{"role": "user", "content": "x", "extra": nested(depth)}])


def test_a_conversation_is_copied_with_all_it_has() -> None:
    call = {"function": {"name": "f", "arguments": {"a": [1, 2.5, True, None, "x"]}}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call], "name": "n"},
        {"role": "tool", "content": {"a": 1}},
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
    ]
    checked = check_messages(tuple(messages))
    assert checked == messages
    assert checked[0]["tool_calls"][0] is not call


def test_texts_of_other_classes_become_plain() -> None:
    class Loud(str):
        def upper(self) -> str:
            raise AssertionError

    [message] = check_messages([{"role": Loud("user"), "content": Loud("x")}])
    assert [type(each) for each in message.values()] == [str, str]


def test_tools_are_a_list_of_objects() -> None:
    assert check_tools(None) is None
    assert check_tools(({"type": "function"},)) == [{"type": "function"}]
    for tools in ("x", {"a": 1}, [1], [[]]):
        with pytest.raises(PromptError, match="Tools are a list of JSON schemas"):
            check_tools(tools)
    with pytest.raises(PromptError, match="The list of tools holds a value"):
        check_tools([len])
