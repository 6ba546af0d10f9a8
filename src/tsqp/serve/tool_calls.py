"""Reads the tool calls in an answer, and puts those of earlier answers into the template's form."""

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tsqp.errors import PromptError
from tsqp.serve.tools import Delta, ToolParser

# Templates of Mistral take ids of nine letters and digits only.
_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9


@dataclass(slots=True)
class Call:
    """A call of a tool, with its arguments as JSON text."""

    name: str
    arguments: str = ""
    id: str = field(
        default_factory=lambda: "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
    )


def deltas(parser: ToolParser | None, text: str, is_last: bool) -> list[Delta]:
    """What the next piece of an answer's text adds to its content and its calls."""
    if parser is None:
        return [Delta(content=text)] if text else []
    found = parser.feed(text)
    return found + parser.finish() if is_last else found


def collect(parser: ToolParser | None, text: str) -> tuple[str, list[Call]]:
    """The content and the calls of a whole answer."""
    content, calls = "", list[Call]()
    for delta in deltas(parser, text, True):
        content += delta.content
        if delta.name is not None:
            calls.append(Call(delta.name))
        elif delta.call is not None:
            calls[delta.call].arguments += delta.arguments
    return content, calls


def with_objects(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, with the arguments of their calls as objects, as templates need them.

    OpenAI has them as JSON text.

    Raises:
        PromptError: the arguments of a call are not JSON. The message does not quote them.
    """
    return [_with_objects(message, number) for number, message in enumerate(messages, 1)]


def _with_objects(message: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise PromptError(f"Message {number} has tool_calls that are not a list.")
    if not calls:  # templates take a message with the key for one that calls
        return {name: value for name, value in message.items() if name != "tool_calls"}
    return {**message, "tool_calls": [_with_object(call, number) for call in calls]}


def _with_object(call: object, number: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise PromptError(f"Message {number} has a tool call without a function.")
    if not isinstance(function.get("name"), str):
        raise PromptError(f"Message {number} has a tool call without a name.")
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping):
        arguments = _object(arguments, number)
    # Some templates write this object as it is, and models write the name first.
    ordered = {"name": function["name"], "arguments": arguments}
    return {**call, "function": {**ordered, **function, "arguments": arguments}}


def _object(text: object, number: int) -> dict[str, Any]:
    if text is None or text == "":
        return {}
    found: object = None
    if isinstance(text, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(text, parse_constant=_refuse)
    if not isinstance(found, dict):
        raise PromptError(
            f"Message {number} has a tool call whose arguments are not the JSON text of an object."
        )
    return found


def _refuse(_: str) -> None:
    raise ValueError
