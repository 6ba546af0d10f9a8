"""Tools that a model may call, and forms that an answer must have."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tsqp.api.base import Answer, Boolean, RequestBody, absent_if_none

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Function(RequestBody):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Boolean | None = None


class Tool(RequestBody):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestBody):
    """The name of a function."""

    name: Name


class NamedTool(RequestBody):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class JsonSchema(RequestBody):
    """A JSON schema with a name."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Boolean | None = None


class TextFormat(RequestBody):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestBody):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestBody):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(RequestBody):
    """vLLM's form of an answer; exactly one field is given. Others are an error, not ignored."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, max_length=4096)] | None = None
    grammar: str | None = None
    json_object: Boolean | None = None


class CalledFunction(Answer):
    """The function that the model calls, with its arguments as JSON; a stream sends pieces."""

    name: Annotated[str | None, absent_if_none()] = None
    arguments: str = ""


class ToolCall(Answer):
    """A call of a tool; in a stream, `index` tells which of several calls it continues."""

    index: Annotated[int | None, absent_if_none()] = None
    id: Annotated[str | None, absent_if_none()] = None
    type: Annotated[Literal["function"] | None, absent_if_none()] = None
    function: CalledFunction
