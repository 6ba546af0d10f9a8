"""What form an answer must have: a JSON schema, a regular expression, a choice, or a grammar."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tsqp.errors import PromptError
from tsqp.tee.text.chat_messages import check_json, check_unicode
from tsqp.tee.values import as_bool, as_list, type_of

MAX_CHARACTERS = 2**17  # of a schema, an expression, a grammar, or all choices together
# Small models would fill an answer with whitespace wherever they may.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
FIELD = "structured_outputs"
MAX_DEPTH = 64  # of a JSON schema: one level of an object takes two


@dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)
class StructuredOutputsParams:
    """The form that an answer must have, with vLLM's names. Exactly one field is given.

    Attributes:
        label: what messages call the form; empty for "The JSON schema of structured outputs" and
            the like. Subclasses have another one.
        json: a JSON schema, as a dict or as a JSON text; kept as a text. Answers are JSON without
            whitespace around it, and with at most 20 characters of whitespace between two tokens.
        regex: a regular expression, which the whole answer matches. It has no look-around and no
            back-references.
        choice: the answer is one of these texts.
        grammar: a grammar in Lark's syntax with the extensions of llguidance; its start rule is
            `start`.
        json_object: the answer is any JSON object.

    Raises:
        PromptError: not exactly one field is given, or it has the wrong type or is too large. The
            message does not show it. Whether the form itself can be followed is checked by
            `Engine.add`.
    """

    label: ClassVar[str] = ""
    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if as_bool(self.json_object) is False:
            object.__setattr__(self, "json_object", None)
        given = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        if len(given) != 1:
            raise PromptError(
                "Structured outputs take exactly one of json, regex, choice, grammar and"
                f" json_object, and {len(given)} are given."
            )
        [name] = given
        shown = f"{FIELD}.{name}" if self.label in ("", FIELD) else self.label
        own = _OWN[name](getattr(self, name), shown)
        object.__setattr__(self, name, own)
        size = len(own) if isinstance(own, str) else 0
        if isinstance(own, tuple):
            size = sum(map(len, own))
        if size > MAX_CHARACTERS:
            raise PromptError(
                f"{shown} has {size} characters, but at most {MAX_CHARACTERS} are"
                " allowed: make it smaller."
            )


def schema_text(schema: object, name: str) -> str:
    """A JSON schema as JSON text, checked; its keys stay in order.

    Args:
        name: what a message calls it.

    Raises:
        PromptError: it is not a JSON object, or is nested too deeply.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise PromptError(f"{name} is not valid JSON.") from None
    if not isinstance(schema, Mapping):
        raise PromptError(f"{name} must be a JSON schema, which is an object.")
    own = check_json(schema, name, MAX_DEPTH)
    # Options of the library that compiles it. Some of them weaken what the schema promises.
    own.pop("x-guidance", None)
    try:
        return json.dumps(own, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise PromptError(f"{name} holds a number that is not finite.") from None


def inline_schema(schema: object, name: str, *, lenient: bool) -> str:
    """A JSON schema as a part of a grammar in Lark's syntax.

    Args:
        name: what a message calls it.
        lenient: ignore keywords that cannot be enforced, and take `oneOf` for `anyOf`.

    Raises:
        PromptError: see `schema_text`.
    """
    own = json.loads(schema_text(schema, name))
    own["x-guidance"] = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return f"%json {json.dumps(own, ensure_ascii=False)}"


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{name} must be a text, not {type_of(value)}.")
    if not value:
        raise PromptError(f"{name} is empty.")
    return check_unicode(value)


def _texts(value: object, name: str) -> tuple[str, ...]:
    items = as_list(value)
    if not items:
        raise PromptError(f"{name} must be a list of at least one text.")
    return tuple(_text(item, f"A text of {name}") for item in items)


def _true(value: object, name: str) -> bool:
    if as_bool(value) is not True:
        raise PromptError(f"{name} must be True or False, not {type_of(value)}.")
    return True


_OWN: dict[str, Callable[[object, str], str | tuple[str, ...] | bool]] = {
    "json": schema_text,
    "regex": _text,
    "choice": _texts,
    "grammar": _text,
    "json_object": _true,
}
