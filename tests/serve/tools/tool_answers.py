"""Answers with tool calls: as templates render them, and as clients put them together."""

from collections.abc import Iterable
from typing import Any

from tool_templates import TEMPLATES, TOOLS

from tsqp.serve.tools import Delta, ToolStyle
from tsqp.tee.text.chat_messages import check_messages
from tsqp.tee.text.chat_template import ChatTemplate

Calls = list[tuple[str, str]]
SETS: list[list[tuple[str, Any]]] = [
    [("add", {"a": 1})],
    [("add", {"a": -5, "note": '"}]\\ é\n'}), ("now", {})],
    [
        ("find_place", {"place": "東京"}),
        ("add", {"a": 2}),
        ("add", {"a": 3, "note": "</tool_call>"}),
    ],
]


def collected(deltas: Iterable[Delta]) -> tuple[str, Calls]:
    """The content and the calls of an answer, as a client puts them together."""
    content, calls = "", []
    for delta in deltas:
        content += delta.content
        if delta.name is not None:
            assert delta.call == len(calls)
            assert not delta.content
            assert not delta.arguments
            calls.append((delta.name, ""))
        elif delta.call is not None:
            assert delta.arguments
            assert not delta.content
            name, arguments = calls[delta.call]
            calls[delta.call] = name, arguments + delta.arguments
        else:
            assert delta.content
    return content, calls


def parse(style: ToolStyle, *pieces: str) -> tuple[str, Calls]:
    parser = style.parser(TOOLS)
    found = [delta for piece in pieces for delta in parser.feed(piece)]
    return collected([*found, *parser.finish()])


def rendered(name: str, calls: list[tuple[str, Any]], content: str | None) -> str:
    """What the template makes of an assistant's message with calls."""
    source, begin, end = TEMPLATES[name]
    key = [
        {
            "id": f"call{n:05d}",
            "type": "function",
            "function": {"name": tool, "arguments": arguments},
        }
        for n, (tool, arguments) in enumerate(calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": key}
    messages = check_messages([{"role": "user", "content": "2+2?"}, message])
    text = str(
        ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
            messages, tools=TOOLS
        )
    )
    return text[text.index(begin, text.index("2+2?")) + len(begin) :].partition(end)[0]
