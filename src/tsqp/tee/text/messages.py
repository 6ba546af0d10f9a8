"""What a conversation may be, wherever it comes from: Python, a file, or a client."""

from collections.abc import Mapping, Sequence
from typing import Any

from tsqp.errors import PromptError

MAX_MESSAGES = 100_000
MAX_DEPTH = 32
FORM = 'A conversation is a list of {"role": "...", "content": "..."}'


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages, checked and copied.

    Content is a text, a list of text parts, or null, as of a message that only calls tools. Other
    keys are handed on to the template as they are.

    Raises:
        PromptError: it is not such a list; says which message is wrong, in no words of it.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"{FORM}.")
    if not messages:
        raise PromptError("The conversation is empty: give at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise PromptError(f"A conversation has {MAX_MESSAGES} messages at most.")
    return [_checked(message, f"Message {n}") for n, message in enumerate(messages, 1)]


def _checked(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{FORM}; {name.lower()} is not such an object.")
    found: dict[str, Any] = _copy(message, name, MAX_DEPTH)
    if not isinstance(found.get("role"), str):
        raise PromptError(f"{name} of the conversation has no role, which must be a text.")
    content = found.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(part, name)
    elif content is not None and not isinstance(content, str):
        raise PromptError(f"{name} has a content that is neither text, text parts, nor null.")
    return found


def _check_part(part: object, name: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in ("text", "input_text", "output_text"):
        if isinstance(part.get("text"), str):
            return
        raise PromptError(f'{name} has a text part without a "text".')
    if kind in ("image", "image_url", "input_audio", "audio", "video", "video_url", "file"):
        raise PromptError(f"{name} has a part of type {kind}, and TSQP serves text only.")
    raise PromptError(f'{name} has a part that is not {{"type": "text", "text": "..."}}.')


def _copy(value: Any, name: str, depth: int) -> Any:
    """A copy of plain JSON values."""
    if depth == 0:
        raise PromptError(f"{name} is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise PromptError(f"{name} has a key that is not a text.")
        return {check_unicode(key): _copy(item, name, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, name, depth - 1) for item in value]
    if isinstance(value, str):
        return check_unicode(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise PromptError(f"{name} holds a {type(value).__name__}, and only JSON values can be used.")


def check_unicode(text: str) -> str:
    """The text.

    Raises:
        PromptError: it is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(
            "The prompt is not valid Unicode text: it holds half of a surrogate pair, or bytes "
            "that are not UTF-8; correct its encoding."
        ) from None
    return str(text)
