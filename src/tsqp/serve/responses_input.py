"""The input and the tools of `/v1/responses`, as chats have them."""

from collections.abc import Mapping
from typing import Any

from tsqp.api.responses import ResponsesRequest
from tsqp.serve.errors import bad_request

PROMPT = "input"
TEXT_PARTS = ("input_text", "output_text", "text")


def messages_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation, as chats have it.

    Raises:
        APIError: an item is not a message of text, a call of a function, or its output.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    before = len(messages)
    for number, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind == "reasoning":
            continue  # of an earlier answer, which no model wants back
        if kind == "function_call":
            _add_call(messages, item, number)
        elif kind == "function_call_output":
            messages.append(_output(item, number))
        elif kind == "message" and isinstance(item.get("role"), str):
            content = _content(item.get("content"), number)
            messages.append({"role": item["role"], "content": content})
        else:
            raise bad_request(
                f"Item {number} of the input is not a message with a role, a function_call or a "
                "function_call_output, and nothing else is supported.",
                PROMPT,
            )
    if len(messages) == before:
        raise bad_request("The input has no messages.", PROMPT)
    return messages


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any], number: int) -> None:
    """Add a call to the assistant's message; calls after a text or another call join it."""
    function = {"name": _text(item, "name", number), "arguments": _text(item, "arguments", number)}
    call = {"id": _text(item, "call_id", number), "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _output(item: Mapping[str, Any], number: int) -> dict[str, Any]:
    content = _content(item.get("output"), number)
    return {"role": "tool", "tool_call_id": _text(item, "call_id", number), "content": content}


def _text(item: Mapping[str, Any], name: str, number: int) -> str:
    text = item.get(name)
    if not isinstance(text, str):
        raise bad_request(f"Item {number} of the input has no {name}, which must be text.", PROMPT)
    return text


def _content(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, Mapping) else None
        if (
            not isinstance(part, Mapping)
            or part.get("type") not in TEXT_PARTS
            or not isinstance(text, str)
        ):
            raise bad_request(f"Item {number} of the input has content that is not text.", PROMPT)
        texts.append(text)
    return "\n".join(texts)


def tools_of(body: ResponsesRequest) -> list[dict[str, Any]] | None:
    """The tools, as chats have them; None where there are none.

    Raises:
        APIError: one of them is not a function.
    """
    tools = []
    for number, tool in enumerate(body.tools or ()):
        if tool.get("type") != "function":
            raise bad_request(
                f"Item {number} of tools is not a function, and this server does not support "
                "tools that it would have to run.",
                "tools",
            )
        function = {key: value for key, value in tool.items() if key in _FUNCTION}
        tools.append({"type": "function", "function": function})
    return tools or None


_FUNCTION = ("name", "description", "parameters", "strict")
