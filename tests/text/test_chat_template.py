"""Chat templates: as transformers renders them, and no further than they may go."""

# ruff: noqa: E501

import itertools
from typing import Any

import pytest
from chat_styles import STYLES
from transformers.utils.chat_template_utils import render_jinja_template

from tsqp.errors import PromptError, TokenizerError, TSQPError
from tsqp.tee.text.chat_template import ChatTemplate
from tsqp.tee.text.messages import check_messages

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
Conversation = list[dict[str, Any]]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [1.5, None]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CONVERSATIONS: dict[str, Conversation] = {
    "one": [{"role": "user", "content": "  Hello \n"}],
    "two turns": [
        {"role": "user", "content": "Hi <b>&amp; \"you\" 'ß' 漢字"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": ""},
    ],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "tools": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
    ],
    "two calls": [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
    "text of arguments": [
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
    ],
}


def expected(source: str, messages: Conversation, **named: Any) -> str | None:
    """What transformers gives, or None where the template or Jinja fails."""
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=source, **SPECIAL, **named
        )
    except Exception:
        return None
    text: str = rendered[0]
    return text


def found(source: str, messages: Conversation, **named: Any) -> str | None:
    try:
        return ChatTemplate(source, SPECIAL).render(check_messages(messages), **named)
    except TSQPError:
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_is_rendered_as_transformers_does(style: str, conversation: str) -> None:
    for tools, prompt in itertools.product((None, TOOLS), (True, False)):
        named: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        wanted = expected(STYLES[style], CONVERSATIONS[conversation], **named)
        assert found(STYLES[style], CONVERSATIONS[conversation], **named) == wanted


def test_values_of_the_caller_reach_the_template() -> None:
    text = found(STYLES["qwen"], CONVERSATIONS["one"], enable_thinking=False)
    assert text is not None
    assert text.endswith("<think>\n\n</think>\n\n")


def test_text_parts_go_to_templates_that_read_parts_and_are_lines_of_text_for_the_others() -> None:
    parts = [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]
    conversation = [{"role": "user", "content": parts}]
    gemma = found(STYLES["gemma"], conversation)
    assert gemma == expected(STYLES["gemma"], conversation, add_generation_prompt=True)
    joined = [{"role": "user", "content": " one \ntwo"}]
    assert found(STYLES["chatml"], conversation) == found(STYLES["chatml"], joined)


def test_the_template_for_tools_is_taken_where_there_are_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "{% bad"}, {})
    assert template.render([]) == "plain"
    assert template.render([], tools=TOOLS) == "tools"


def test_several_templates_without_a_default_are_named() -> None:
    with pytest.raises(TokenizerError, match="none is the default: 'rag, tool_use'"):
        ChatTemplate({"tool_use": "x", "rag": "y"}, {})


def test_a_template_that_is_not_jinja_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"cannot be used \(.* in line 2\)"):
        ChatTemplate("\n{% for %}", {})
    with pytest.raises(TokenizerError, match="longer than"):
        ChatTemplate("x" * (2**20 + 1), {})
    with pytest.raises(TokenizerError, match="cannot be used"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", {})


def test_a_sentence_of_the_template_is_shown_and_one_with_the_users_words_is_not() -> None:
    template = ChatTemplate(STYLES["mistral"], SPECIAL)
    twice = [{"role": "user", "content": "Cinnamon"}] * 2
    with pytest.raises(PromptError, match="must alternate user/assistant"):
        template.render(twice)
    with pytest.raises(PromptError) as refused:
        template.render([{"role": "cinnamon", "content": "x"}])
    assert "cinnamon" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


ENDLESS = {
    "a long loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "a range as a list": "{{ range(10**9) | list | length }}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{{ loop([x, x]) }}{% endfor %}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a repeated list": "{{ [1] * 10**10 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a shift of powers": "{% set ns = namespace(n=7) %}{% for i in range(99) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a doubled text": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "a doubled sum": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "a doubled block": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set t %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = t %}{% endfor %}",
    "a doubled list": "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "a nested list as text": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
    "a nested list as JSON": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(38) %}"
    "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t | tojson }}",
    "replacing": "{% set ns = namespace(t='a') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t.replace('a', 'aaaaaaaa') %}{% endfor %}",
    "the filter replace": "{% set ns = namespace(t='a') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t | replace('a', 'aaaaaaaa') %}{% endfor %}",
    "joining": "{% set ns = namespace(t='a') %}{% for i in range(60) %}"
    "{% set ns.t = ns.t.join(['aa', 'aa', 'aa']) %}{% endfor %}",
    "the filter join": "{% set ns = namespace(t='a') %}{% for i in range(60) %}"
    "{% set ns.t = [1, 2, 3, 4] | join(ns.t) %}{% endfor %}",
    "indenting": "{{ [[1]] | tojson(indent=10**9) }}",
    "separators": "{{ [1, 2] | tojson(separators=['a' + ' ' + 'b' + '                ', ':']) }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "centring": "{{ 'a' | center(10**10) }}",
    "formatting": "{{ '%10000000000d' % 1 }}",
    "the method format": "{{ '{:>10000000000}'.format(1) }}",
    "the filter format": "{{ '%10000000000d' | format(1) }}",
    "a wide date": "{{ strftime_now('%1000000000Y') }}",
    "much output": "{% for i in range(3000) %}{{ messages }}{% endfor %}" + "x" * 100_000,
    "lines without a loop": "{{ 1 }}\n" * 1000
    + "{% for i in range(1000) %}{% for j in range(1000) %}{{ i }}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("attack", ENDLESS)
def test_a_template_that_would_not_end_or_fit_is_stopped(attack: str) -> None:
    messages = check_messages([{"role": "user", "content": "a" * 5000}])
    with pytest.raises((TokenizerError, PromptError)) as stopped:
        ChatTemplate(ENDLESS[attack], SPECIAL).render(messages)
    assert "aaaa" not in str(stopped.value)
    assert ChatTemplate("{{ messages[0].content }}", {}).render(messages) == "a" * 5000


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ self.__init__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum(n=100000) }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    messages = check_messages(CONVERSATIONS["one"])
    try:
        text = ChatTemplate(source, SPECIAL).render(messages)
    except TSQPError:
        return
    assert text == ""  # what is not there is nothing
    assert messages == CONVERSATIONS["one"]


def test_the_trace_function_of_a_debugger_is_given_back() -> None:
    import sys

    seen: list[str] = []

    def trace(frame: object, event: str, _: object) -> None:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        ChatTemplate("x", {}).render([])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("Hello", "A conversation is a list"),
        ([], "The conversation is empty"),
        (["Hello"], "message 1 is not such an object"),
        ([{"content": "x"}], "Message 1 of the conversation has no role"),
        ([{"role": 3}], "has no role"),
        ([{"role": "user", "content": 5}], "neither text, text parts, nor null"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "of type image_url, and TSQP"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'without a "text"'),
        ([{"role": "user", "content": ["x"]}], "a part that is not"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": "x", "name": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "a key that is not a text"),
        ([{"role": "user", "content": "x", "extra": object()}], "only JSON values"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        check_messages(messages)


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(PromptError, match="levels deep"):
        check_messages([{"role": "user", "content": "x", "extra": deep}])


def test_other_keys_and_null_contents_are_handed_on() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [CALL], "name": "n"}]
    assert check_messages(messages) == messages
    assert found("{{ messages[0].content is none }}", messages) == "True"
    assert found("{{ messages[0].name }}", messages) == "n"
