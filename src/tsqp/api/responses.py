"""`/v1/responses`, as far as it needs no state."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tsqp.api.base import (
    MAX_INTEGER,
    Answer,
    Boolean,
    Integer,
    Number,
    RequestBody,
    absent_if_none,
)

Items = Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=4096)]


class ResponseText(RequestBody):
    """The form of the answer."""

    format: dict[str, Any] | None = None


class ResponsesRequest(RequestBody):
    """A conversation to answer.

    Attributes:
        input: a text, or items; those that are messages have a role and a content.
        instructions: the system message.
    """

    model: str | None = None
    input: (
        str | Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=4096)]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[Integer, Field(ge=1, le=MAX_INTEGER)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stream: Boolean | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: Boolean | None = None
    store: Any = None
    text: ResponseText | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Boolean | None = None
    metadata: Any = None
    user: Any = None


class OutputText(Answer):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = Field(default_factory=list)
    logprobs: list[str] = Field(default_factory=list)


class OutputMessage(Answer):
    """The answer of the model."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class FunctionCall(Answer):
    """A call of a function, with its arguments as JSON text."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = ""
    status: Literal["in_progress", "completed", "incomplete"]


OutputItem = OutputMessage | FunctionCall


class InputDetails(Answer):
    """Of the tokens of the prompt."""

    cached_tokens: int


class OutputDetails(Answer):
    """Of the tokens of the answer."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Answer):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class Response(Answer):
    """An answer. It is not kept."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: bool = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str] = Field(default_factory=dict)


class ResponseEvent(Answer):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: Annotated[Response | None, absent_if_none()] = None
    output_index: Annotated[int | None, absent_if_none()] = None
    item_id: Annotated[str | None, absent_if_none()] = None
    content_index: Annotated[int | None, absent_if_none()] = None
    item: Annotated[OutputItem | None, absent_if_none()] = None
    name: Annotated[str | None, absent_if_none()] = None
    arguments: Annotated[str | None, absent_if_none()] = None
    part: Annotated[OutputText | None, absent_if_none()] = None
    delta: Annotated[str | None, absent_if_none()] = None
    text: Annotated[str | None, absent_if_none()] = None
    logprobs: Annotated[list[str] | None, absent_if_none()] = None
