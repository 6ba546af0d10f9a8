"""Keep what people type from becoming control tokens.

A chat template marks messages with control tokens such as `<|im_start|>`. A user who types the same
characters would make the same tokens, and could pretend to be the system. Here every control token
in the messages is broken up by a guard, a character that occurs nowhere else and that is a token of
its own, so that nothing is joined across it. The guards are taken out of the token ids at the end.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tsqp.errors import PromptError
from tsqp.tee.text.vocabulary import Vocabulary, rust_errors

GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode has no characters there
ROLE = re.compile(r"[\w-]{1,64}")
NAMES = ("role", "type", "name", "id", "tool_call_id")  # which templates compare
PLACEHOLDER = "x"


class ControlTokens:
    """The control tokens of one model.

    Args:
        vocabulary: encodes, and knows the added tokens.
        templates: the chat templates; added tokens that stand in them count as control tokens too.
    """

    def __init__(self, vocabulary: Vocabulary, templates: Iterable[str]) -> None:
        self._vocabulary = vocabulary
        self._templates = "\0".join(templates)
        added = vocabulary.backend.get_added_tokens_decoder().values()
        self._tokens = {
            each.content for each in added if each.special or each.content in self._templates
        }
        self._tokens.discard("")
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._starts = re.compile(f"(?={self._pattern.pattern})(.)", re.DOTALL)
        self._guarded: dict[str, tokenizers.Tokenizer] = {}

    def encode(
        self,
        messages: list[dict[str, Any]],
        render: Callable[[list[dict[str, Any]]], str],
        encode: Callable[[str], list[int]],
    ) -> list[int]:
        """The ids of a conversation whose control tokens all come from the template.

        Args:
            messages: as `check_messages` returns them.
            render: puts messages into the template.
            encode: the ids of a text, as without this class.

        Raises:
            PromptError: the messages change which control tokens the template writes, or hold a
                control token that cannot be broken up.
        """
        for number, message in enumerate(messages, 1):
            if not ROLE.fullmatch(message["role"]):
                raise PromptError(f"Message {number} has a role that is not a plain word.")
        guard = self._guard(messages)
        broken = [_mapped(each, lambda text: self._break_up(text, guard)) for each in messages]
        text = render(broken)
        shape = render([_with_placeholders(each) for each in broken])
        escaped = json.dumps(guard)[1:-1] in text  # by a template that writes JSON in ASCII
        if escaped or self._pattern.findall(text) != self._pattern.findall(shape):
            raise PromptError(
                "The content of a message changes which control tokens the chat template writes, "
                "so --split-special cannot keep them apart: change the message, or leave the "
                "option out."
            )
        return self._encode_guarded(text, guard) if guard in text else encode(text)

    def _guard(self, messages: list[dict[str, Any]]) -> str:
        used = set(self._templates)
        used.update(json.dumps(messages, ensure_ascii=False))
        for guard in GUARDS:
            if guard not in used:
                return guard
        raise PromptError("The conversation holds every code point that could keep tokens apart.")

    def _break_up(self, text: str, guard: str) -> str:
        """The text with a guard inside each control token."""
        broken = self._starts.sub(lambda found: found[1] + guard, text)
        if self._pattern.search(broken):  # a token of a single character
            raise PromptError(
                "A message holds a control token of one character, which cannot be broken up: "
                "leave it out, or leave --split-special out."
            )
        return broken

    def _encode_guarded(self, text: str, guard: str) -> list[int]:
        with rust_errors("The model's tokenizer failed on this text; pass token ids instead."):
            if guard not in self._guarded:
                copy = tokenizers.Tokenizer.from_str(self._vocabulary.backend.to_str())
                copy.add_special_tokens([AddedToken(guard, normalized=False, special=True)])
                self._guarded[guard] = copy
            backend = self._guarded[guard]
            ids = backend.encode(self._vocabulary.prepare(text), add_special_tokens=False).ids
            guard_id = backend.token_to_id(guard)
        return [token_id for token_id in ids if token_id != guard_id]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a message in which `change` was applied to every text and every name of a field."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _mapped(item, change) for name, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _with_placeholders(value: Any, key: str = "") -> Any:
    """A copy of a message whose texts are harmless, and as empty as they were; names stay."""
    if isinstance(value, str):
        inner = value.strip()
        return value if key in NAMES or not inner else value.replace(inner, PLACEHOLDER, 1)
    if isinstance(value, Mapping):
        return {name: _with_placeholders(item, name) for name, item in value.items()}
    return [_with_placeholders(item, key) for item in value] if isinstance(value, list) else value
