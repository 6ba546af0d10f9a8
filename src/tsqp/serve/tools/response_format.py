"""OpenAI's `response_format`, as structured outputs."""

from collections.abc import Mapping
from typing import Any

from tsqp.errors import PromptError
from tsqp.tee.structured_outputs import StructuredOutputsParams, inline_schema


def structured_outputs_of(
    response_format: Mapping[str, Any] | None,
) -> StructuredOutputsParams | None:
    """The form that an answer must have, or None for any text.

    The types are "text", "json_object" and "json_schema". A schema is always enforced. Without
    `strict`, keywords that cannot be enforced are ignored; with it, they are refused.

    Raises:
        PromptError: it is not a response format. The message does not quote it.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise PromptError("response_format must be an object.")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind != "json_schema":
        raise PromptError(
            'The type of response_format must be "text", "json_object" or "json_schema".'
        )
    # In the Responses API, the fields stand beside the type.
    given = response_format.get("json_schema", response_format)
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping):
        raise PromptError("response_format.json_schema must have a schema, which is an object.")
    strict = given.get("strict")
    if strict not in (None, True, False):
        raise PromptError("response_format.json_schema.strict must be true, false or null.")
    if strict:
        return StructuredOutputsParams(json=schema)
    inline = inline_schema(schema, "The schema of response_format", lenient=True)
    return StructuredOutputsParams(grammar=f"start: {inline}")
