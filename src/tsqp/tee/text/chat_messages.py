"""Checks conversations, whether they come from Python, a file or a client."""

from collections.abc import Mapping, Sequence
from typing import Any

from tsqp.errors import PromptError
from tsqp.tee.text.template_values import MAX_BITS

MAX_DEPTH = 32
OTHER_PARTS = (
    "audio", "file", "image", "image_url", "input_audio", "input_file", "input_image", "video",
    "video_url",
)  # fmt: skip
OWN_VALUES = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self",
}  # fmt: skip
FORM = 'A conversation is a list of {"role": "...", "content": "..."}'


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages, checked and copied.

    Content is a text, a list of text parts, an object, or null, which is the usual form of a
    message that only calls tools. All other keys are for the template.

    Raises:
        PromptError: it is not such a list. The error gives the number of the wrong message, without
            quoting it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"{FORM}.")
    if not messages:
        raise PromptError("The conversation is empty: give at least one message.")
    return [_checked(message, f"Message {n}") for n, message in enumerate(messages, 1)]


def check_tools(tools: object) -> list[dict[str, Any]] | None:
    """Descriptions of tools, as JSON schemas, checked and copied; None if there are none.

    Raises:
        PromptError: it is not a list of objects.
    """
    if tools is None:
        return None
    found = check_json(tools, "The list of tools", MAX_DEPTH)
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise PromptError("Tools are a list of JSON schemas, one object for each tool.")
    return found


def check_template_kwargs(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Further values for a chat template, by name, checked and copied.

    Raises:
        PromptError: it is not an object of JSON values, or names something that has an argument of
            its own.
    """
    if values is None:
        return {}
    found = check_json(values, "The object of values for the chat template", MAX_DEPTH)
    if not isinstance(found, dict):
        raise PromptError("The values for the chat template are an object, with their names.")
    own = found.keys() & OWN_VALUES
    if own:
        raise PromptError(
            f"The values for the chat template may not include {min(own)}, which has a field of "
            "its own."
        )
    return found


def _checked(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{FORM}; {name.lower()} is not an object.")
    found: dict[str, Any] = check_json(message, name, MAX_DEPTH)
    if not isinstance(found.get("role"), str):
        raise PromptError(f"{name} of the conversation has no role, which must be a text.")
    content = found.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(part, name)
    elif content is not None and not isinstance(content, str | dict):
        raise PromptError(f"{name} has a content that is not text, text parts, an object or null.")
    return found


def _check_part(part: object, name: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in OTHER_PARTS:
        raise PromptError(f"{name} has a part of type {kind}, but TSQP supports only text.")
    if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
        raise PromptError(f'{name} has a part that is not {{"type": "text", "text": "..."}}.')


def check_json(value: Any, name: str, most: int, depth: int = 0) -> Any:
    """A copy of plain JSON values.

    Args:
        name: what a message calls them.
        most: how many levels of lists and objects there may be.

    Raises:
        PromptError: there is a value that JSON does not have, or too many levels.
    """
    if isinstance(value, str):
        return check_unicode(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise PromptError(f"{name} holds a number that is too large.")
        return value
    if depth == most:
        raise PromptError(f"{name} is nested more than {most} levels deep.")
    if isinstance(value, list | tuple):
        return [check_json(item, name, most, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise PromptError(f"{name} holds a value of type {kind}; it may hold JSON values only.")
    if not all(isinstance(key, str) for key in value):
        raise PromptError(f"{name} has a key that is not a text.")
    return {
        check_unicode(key): check_json(item, name, most, depth + 1) for key, item in value.items()
    }


def check_unicode(text: str) -> str:
    """The text.

    Raises:
        PromptError: it is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        pass  # and no cause: it quotes the text
    else:
        return str(text)
    raise PromptError(
        "The prompt is not valid Unicode text: it holds half of a surrogate pair, or bytes "
        "that are not UTF-8; correct its encoding."
    )
