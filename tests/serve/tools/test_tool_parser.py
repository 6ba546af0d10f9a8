"""Tool calls are found in an answer however it is cut, and no answer is an error."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_answers import SETS, parse, rendered
from tool_templates import TEMPLATES, TOOLS

from tsqp.errors import UsageError
from tsqp.serve.tools import Delta, tool_style
from tsqp.serve.tools.json_object import JsonObject
from tsqp.serve.tools.styles import STYLES


def examples(name: str) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """Texts of an answer, with their content and calls."""
    sets = [calls for calls in SETS if len(calls) == 1 or STYLES[name].may_call_several]
    contents = [""] if name in ("llama3_json", "mistral") else ["", "Let me see: <b> {"]
    return [(rendered(name, calls, c), c, calls) for calls in sets for c in contents]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_renders_is_parsed(name: str) -> None:
    for text, content, calls in examples(name):
        found_content, found = parse(STYLES[name], text)
        assert found_content == content
        assert [(tool, json.loads(arguments)) for tool, arguments in found] == calls


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_cut_anywhere_gives_the_same(name: str) -> None:
    style = STYLES[name]
    for text, _, _ in examples(name):
        wanted = parse(style, text)
        for place in range(len(text) + 1):
            assert parse(style, text[:place], text[place:]) == wanted
        assert parse(style, *text) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_are_given_out_as_they_come(name: str) -> None:
    parser = STYLES[name].parser(TOOLS)
    text = rendered(name, [("add", {"a": 1, "note": "abc"})], None)
    deltas = [delta for character in text for delta in parser.feed(character)]
    assert deltas[0] == Delta(call=0, name="add")
    assert deltas[1] == Delta(call=0, arguments="{")
    assert "".join(delta.arguments for delta in deltas[1:]) == '{"a": 1, "note": "abc"}'
    assert len(deltas) == len('{"a": 1, "note": "abc"}') + 1
    assert parser.finish() == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_style_of_a_template_is_found_in_its_source(name: str) -> None:
    source = TEMPLATES[name][0]
    assert tool_style(source) is STYLES[name]
    assert tool_style({"default": source, "other": "x"}) is STYLES[name]
    assert tool_style("{{ messages }}", name) is STYLES[name]


def test_templates_without_tool_calls_have_no_style() -> None:
    assert tool_style("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert tool_style(None) is None
    assert tool_style({"rag": "<tool_call>"}) is None
    with pytest.raises(UsageError, match="use granite, hermes, llama3_json"):
        tool_style("x", "no_such")


WRONG = [
    "",
    "  \n",
    "Just text, with <tool_ and { and [.",
    "<tool_call>",
    "<tool_call>\n",
    "<tool_call>nothing</tool_call>",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "add"}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"arguments": {}, "name": "add"}</tool_call>',
    '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "a\\qdd", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "' + "x" * 1000,
    "<tool_call>[]</tool_call>",
    "<tool_call>[[",
    "<tool_call><tool_call><tool_call>",
    "[TOOL_CALLS]",
    '[TOOL_CALLS] {"nam',
    "[TOOL_CALLS] [1]",
    '[TOOL_CALLS][TOOL_CALLS] [{"name": 5}]',
    "<|tool_call|>{}<|/tool_call|>",
    "<|tool_call|>]",
    '<|python_tag|>{"name": "nope", "parameters": {}}',
    '{"a": 1}',
    "{}",
    '  {"name": "other", "parameters": {}}',
]


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_not_a_call_is_content(name: str, text: str) -> None:
    style = STYLES[name]
    assert parse(style, text) == (text, [])
    assert parse(style, *text) == (text, [])


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"llama3_json"}))
def test_a_call_after_something_that_was_none_is_found(name: str) -> None:
    style = STYLES[name]
    call = rendered(name, [("add", {"a": 1})], None).strip()
    opening = style.frame.openings[0]
    for before in (opening, f"{opening} {{", f'{opening}{{"name": "', "x ", opening[:-1]):
        content, calls = parse(style, f"{before}{call}")
        assert [tool for tool, _ in calls] == ["add"]
        assert content == before.rstrip(" " if before == "x " else "")


def test_broken_arguments_end_the_call_and_the_rest_is_content() -> None:
    begin = '<tool_call>{"name": "add", "arguments": {"a": 1'
    for rest in ("]}", "x", "}x", ' "b"', ",}"):
        content, [(tool, arguments)] = parse(STYLES["hermes"], f"{begin}{rest} and more")
        assert tool == "add"
        assert f'{{"a": 1{rest} and more'.startswith(arguments)
        assert content
        assert (arguments + content).replace(" ", "") == f'{{"a": 1{rest} and more'.replace(" ", "")


def test_an_answer_that_is_cut_in_its_arguments_keeps_the_call() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "no'
    assert parse(STYLES["hermes"], text) == ("", [("add", '{"a": 1, "no')])


PARTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>", "<tool_"),
    *("<|python_tag|>", "{", "}", "[", "]", ",", ":", '"', '"name"', '"add"', '"now"', '"id"', " "),
    *('"arguments"', '"parameters"', "\n", "\\", "\\u12", "1", "e", "-", "true", "nul", "x", "漢"),
    *('{"name": "add", "arguments": {"a": 1}}', '{"name": "now", "parameters": {', "\ud800", "\0"),
]


@given(
    st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    st.sampled_from(sorted(STYLES)),
    st.integers(0, 40),
)
@settings(max_examples=150)
def test_hostile_text_is_never_an_error_and_never_lost(text: str, name: str, place: int) -> None:
    style = STYLES[name]
    content, calls = parse(style, text)
    assert parse(style, *text) == (content, calls)
    assert parse(style, text[:place], text[place:]) == (content, calls)
    kept = iter(text)
    assert all(character in kept for character in content)  # in order
    if not calls:
        assert content == text
    assert {tool for tool, _ in calls} <= {"add", "now", "find_place"}


@pytest.mark.parametrize(
    "part",
    [
        "<tool_call>",
        '<tool_call>{"name":"',
        " ",
        "<",
        '<tool_call>{"name": "add", "arguments": {"a":',
        "[{",
    ],
)
def test_long_hostile_answers_take_linear_time(part: str) -> None:
    """Counted in characters that are read, so that the speed of the machine does not matter."""
    parser = STYLES["hermes"].parser(TOOLS)
    read = 0
    push = parser._push

    def counted(character: str) -> str:
        nonlocal read
        read += 1
        return push(character)

    parser._push = counted  # type: ignore[method-assign]
    text = part * (20_000 // len(part))
    parser.feed(text)
    parser.finish()
    assert read < 40 * len(text)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def accepts(text: str) -> bool:
    reader = JsonObject()
    for place, character in enumerate(text):
        if not reader.push(character):
            return False
        if reader.is_complete:
            return place == len(text) - 1
    return False


@given(
    st.dictionaries(st.text(), VALUES, max_size=4),
    st.integers(0, 60),
    st.sampled_from('{}[]",:\\ux0-.eE+ tn\n\x01'),
)
@settings(max_examples=120)
def test_an_object_is_accepted_exactly_if_json_accepts_it(
    value: dict[str, Any], place: int, changed: str
) -> None:
    for indent, ascii_only in itertools.product((None, 1), (True, False)):
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
        assert accepts(text)
        broken = text[:place] + changed + text[place + 1 :]
        try:
            wanted = isinstance(json.loads(broken), dict) and broken[0] == "{" and broken[-1] == "}"
        except ValueError:
            wanted = False
        assert accepts(broken) is wanted
