"""OpenAI's `response_format`, as structured outputs."""

from collections.abc import Mapping
from typing import Any

from tsqp.errors import PromptError
from tsqp.tee.structured_outputs import (
    FIELD,
    StructuredOutputsParams,
    inline_schema,
    schema_text,
)

_ANY_OBJECT = {"type": "object"}


class ResponseFormat(StructuredOutputsParams):
    """Structured outputs that messages call `response_format`."""

    label = "response_format"


class TextFormat(StructuredOutputsParams):
    """The same for `text.format`, the name in the Responses API."""

    label = "text.format"


class StructuredOutputsField(StructuredOutputsParams):
    """The same for vLLM's `structured_outputs`."""

    label = FIELD


def structured_outputs_of(
    response_format: Mapping[str, Any] | None,
    kind: type[StructuredOutputsParams] = ResponseFormat,
) -> StructuredOutputsParams | None:
    """The form that an answer must have, or None for any text.

    The types are "text", "json_object" and "json_schema". A schema is always enforced. Without
    `strict`, keywords that cannot be enforced are ignored; with it, they are refused.

    Args:
        kind: has the name of the field, for messages.

    Raises:
        PromptError: it is not a response format. The message does not quote it.
    """
    found = _schema(response_format, kind.label)
    if found is None:
        return None
    schema, is_lenient = found
    if is_lenient:
        return kind(grammar=f"start: {inline_schema(schema, kind.label, lenient=True)}")
    return kind(json=schema_text(schema, kind.label))


def inline_format(
    response_format: Mapping[str, Any] | None,
    kind: type[StructuredOutputsParams] = ResponseFormat,
) -> str:
    """The same as a part of a grammar in Lark's syntax; empty for any text.

    Raises:
        PromptError: see `structured_outputs_of`.
    """
    found = _schema(response_format, kind.label)
    return "" if found is None else inline_schema(found[0], kind.label, lenient=found[1])


def _schema(
    response_format: Mapping[str, Any] | None, label: str
) -> tuple[Mapping[str, Any], bool] | None:
    """The schema, and whether keywords that cannot be enforced are ignored; None for any text."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise PromptError(f"{label} must be an object.")
    form = response_format.get("type")
    if form == "text":
        return None
    if form == "json_object":
        return _ANY_OBJECT, False
    if form != "json_schema":
        raise PromptError(f'{label}.type must be "text", "json_object" or "json_schema".')
    # In the Responses API, the fields stand beside the type.
    given = response_format.get("json_schema", response_format)
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping):
        raise PromptError(f"{label} must have a schema, which is an object.")
    strict = given.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise PromptError(f"{label} has a strict that is not true, false or null.")
    return schema, not strict
