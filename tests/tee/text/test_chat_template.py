"""Chat templates are rendered as transformers renders them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from chat_styles import STYLES
from tsqp.errors import PromptError, TokenizerError, TSQPError
from tsqp.tee.text.chat_messages import check_messages
from tsqp.tee.text.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
Conversation = list[dict[str, Any]]
ARGUMENTS = {"a": 2, "b": [1.5, None, "é"], "c": {"x": True}}
CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
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
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ],
    "two calls": [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
    "text of arguments": [
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
    ],
    "an object": [{"role": "tool", "content": {"temperature": 21, "unit": "°C"}}],
}
ALL = [
    {"role": "system", "content": " Be b. "},
    {"role": "user", "content": "  Héllo ß <b> \n x"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
]
IDIOMS = (Path(__file__).parent / "template_idioms.txt").read_text().splitlines()


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
        return str(ChatTemplate(source, SPECIAL).render(check_messages(messages), **named))
    except TSQPError:
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_is_rendered_as_transformers_does(style: str, conversation: str) -> None:
    for tools, prompt in itertools.product((None, TOOLS), (True, False)):
        named: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        wanted = expected(STYLES[style], CONVERSATIONS[conversation], **named)
        assert found(STYLES[style], CONVERSATIONS[conversation], **named) == wanted


@pytest.mark.parametrize("source", IDIOMS)
def test_what_templates_do_is_done_as_in_jinja(source: str) -> None:
    for tools in (None, TOOLS):
        wanted = expected(source, ALL, tools=tools, add_generation_prompt=True)
        assert wanted is not None or tools is None
        assert found(source, ALL, tools=tools) == wanted


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].missing.deeper }}",
        "{{ none + 'x' }}",
        "{{ 'x' + 1 }}",
        "{{ messages.nope() }}",
        "{{ 1 // 0 }}",
        "{{ messages | length(3) }}",
        "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}",
        "{% macro m(a) %}{% endmacro %}{{ m(1, a=2) }}",
        "{% macro m(a) %}{% endmacro %}{{ m(b=2) }}",
        "{% set a, b = [1, 2, 3] %}",
        "{% for x in 5 %}{% endfor %}",
        "{{ 'abc'.split('') }}",
        "{{ '%d' % 'x' }}",
        "{{ '%s' % ('a', 'b') }}",
        "{{ messages | map('nope') | list }}",
        "{{ range(3) | tojson }}",
        "{% set ns = 3 %}{% set ns.x = 1 %}",
    ],
)
def test_what_fails_in_jinja_fails(source: str) -> None:
    assert expected(source, ALL) is None
    assert found(source, ALL) is None


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=20)}
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=40)
def test_any_text_is_rendered_as_transformers_does(messages: Conversation) -> None:
    for source in STYLES.values():
        assert found(source, messages) == expected(source, messages, add_generation_prompt=True)


def test_values_of_the_caller_reach_the_template() -> None:
    text = found(STYLES["qwen"], CONVERSATIONS["one"], enable_thinking=False)
    assert text is not None
    assert text.endswith("<think>\n\n</think>\n\n")
    named = {"bos_token": "mine", "documents": [{"title": "t"}]}
    source = "{{ bos_token }}{{ documents }}{{ eos_token }}"
    assert found(source, ALL, **named) == "mine[{'title': 't'}]</s>"


def test_null_content_reaches_the_template_and_other_nulls_are_left_out() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": None, "name": None}]
    source = "{{ messages[0].content is none }}{{ 'tool_calls' in messages[0] }}{{ messages }}"
    assert found(source, messages) == (
        "TrueFalse[{'role': 'assistant', 'content': None}]"  # the rest is as if it were absent
    )


def test_reasoning_has_the_names_that_templates_know() -> None:
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    for name in ("reasoning", "thinking", "reasoning_content"):
        messages = [{"role": "assistant", "content": "x", name: "hm"}]
        assert found(source, messages) == expected(source, messages) == "hm|hm"


@pytest.mark.parametrize("content", ["Hello, ", "Hel", " x \n", [{"type": "text", "text": "Hi "}]])
@pytest.mark.parametrize("style", STYLES)
def test_the_last_message_can_be_continued(style: str, content: Any) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    named = {"continue_final_message": True, "add_generation_prompt": False}
    wanted = expected(STYLES[style], messages, **named)
    if isinstance(content, list) and style != "gemma":
        messages[1]["content"] = content[0]["text"]
        wanted = expected(STYLES[style], messages, **named)
        messages[1]["content"] = content
    assert wanted is not None
    assert found(STYLES[style], messages, **named) == wanted


def test_a_last_message_that_the_template_changes_cannot_be_continued() -> None:
    named = {"continue_final_message": True, "add_generation_prompt": False}
    messages = [{"role": "user", "content": "Cinnamon"}]
    with pytest.raises(PromptError, match="changes the last message") as refused:
        ChatTemplate("{{ messages[0].content | upper }}", {}).render(messages, **named)
    assert "innamon" not in str(refused.value)
    with pytest.raises(PromptError, match="but not both"):
        ChatTemplate("x", {}).render(messages, continue_final_message=True)
    with pytest.raises(PromptError, match="no text to continue"):
        ChatTemplate("x", {}).render([{"role": "user", "content": None}], **named)


PARTS = [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]
READS_PARTS = [
    "{% for m in messages %}{% for c in m.content %}{{ c.text }},{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for c in m['content'] | list %}{{ c.text }},{% endfor %}"
    "{% endfor %}",
    "{% set loop_messages = messages[0:] %}{% for m in loop_messages %}{% set c = m['content'] %}"
    "{% for p in c %}{{ p['text'] }},{% endfor %}{% endfor %}",
    "{% macro show(c) %}{% for p in c %}{{ p.text }},{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
]


@pytest.mark.parametrize("source", READS_PARTS)
def test_text_parts_go_to_templates_that_read_parts(source: str) -> None:
    messages = [{"role": "user", "content": PARTS}]
    assert found(source, messages) == expected(source, messages) == " one ,two,"


@pytest.mark.parametrize("style", sorted(STYLES.keys() - {"gemma"}))
def test_text_parts_are_lines_of_text_for_other_templates(style: str) -> None:
    joined = [{"role": "user", "content": " one \ntwo"}]
    text = found(STYLES[style], [{"role": "user", "content": PARTS}])
    assert text == expected(STYLES[style], joined, add_generation_prompt=True)


def test_the_template_for_tools_is_taken_where_there_are_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "{% bad"}, {})
    assert template.render([]) == "plain"
    assert template.render([], tools=TOOLS) == "tools"


def test_several_templates_without_a_default_are_named() -> None:
    with pytest.raises(TokenizerError, match="none is the default: 'rag, tool_use'"):
        ChatTemplate({"tool_use": "x", "rag": "y"}, {})


TWICE = [{"role": "user", "content": "Cinnamon"}] * 2


def refusal(source: str, messages: Conversation) -> TSQPError:
    with pytest.raises(TSQPError) as refused:
        ChatTemplate(source, SPECIAL).render(messages)
    assert "innamon" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
    return refused.value


def test_a_sentence_of_the_template_is_shown() -> None:
    error = refusal(STYLES["mistral"], TWICE)
    assert isinstance(error, PromptError)
    assert str(error).endswith(
        "refuses these messages: Conversation roles must alternate user/assistant"
    )
    odd = refusal("{{ raise_exception('a\\x1b[2J\\nb' ) }}", TWICE)
    assert str(odd).endswith(": a [2J b")


@pytest.mark.parametrize(
    "said",
    [
        "'Only user, not ' + messages[0].content",
        "messages[0].content",
        "'Cinnamon'[0:4] ~ messages[0].content[4:]",
        "'abcdefghijklmnopqrstuvwxyz'[messages[0].content | length]",
        "('C' ~ 'i') ~ 'nnamon'",
        "messages",
    ],
)
def test_any_other_sentence_is_not(said: str) -> None:
    error = refusal("{{ raise_exception(" + said + ") }}", TWICE)
    assert str(error) == (
        "The model's chat template refuses these messages: check their roles and their order."
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content.nope.nope }}",
        "{{ messages[0][messages[0].content].x }}",
        "{{ namespace()[messages[0].content].x }}",
        "{% for x in [1] %}{{ loop[messages[0].content].x }}{% endfor %}",
        "{{ [] | map(messages[0].content) | list }}{{ [1] | map(messages[0].content) | list }}",
        "{{ [1] | select(messages[0].content) | list }}",
        "{{ {messages: 1} }}",
        "{{ messages[0].content | int(base=99) }}{{ messages[0].content.index('x') }}",
        "{{ {'a': namespace} | tojson }}",
        "{{ strftime_now(messages[0].content ~ '%Q') }}",
    ],
)
def test_no_failure_tells_the_conversation(source: str) -> None:
    refusal(source, TWICE)


def test_what_is_missing_is_named_where_the_template_names_it() -> None:
    error = refusal("{{ 'x' + messages[0]['tool_calls'] }}", TWICE)
    assert str(error).endswith("these messages: it needs 'tool_calls', which they do not have.")
    error = refusal("{{ 'x' + messages[1].content }}", [*TWICE[:1], {"role": "x", "content": None}])
    assert str(error).endswith("message 2 has no content, which this template may need.")
