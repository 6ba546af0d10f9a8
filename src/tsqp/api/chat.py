"""`/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tsqp.api.base import (
    MAX_INTEGER,
    Answer,
    Boolean,
    Integer,
    SamplingFields,
    UsageInfo,
    absent_if_none,
)
from tsqp.api.tools import ResponseFormat, StructuredOutputs, Tool, ToolCall, ToolChoice

# What is inside is checked by `tsqp.tee.text.chat_messages`, whose errors do not quote it.
Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=4096)]


class ChatRequest(SamplingFields):
    """A conversation to answer.

    Attributes:
        split_special: treat control tokens in messages as plain text.
    """

    messages: Messages
    max_completion_tokens: Annotated[Integer, Field(ge=1, le=MAX_INTEGER)] | None = None
    logprobs: Boolean | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Boolean | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Boolean | None = None
    continue_final_message: Boolean | None = None
    split_special: Boolean | None = None


class TopLogprob(Answer):
    """A token that could have been in this place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """The tokens of an answer, or of a piece of one."""

    content: list[TokenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class ChatMessage(Answer):
    """The answer of the model."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall] | None, absent_if_none()] = None


class ChatChoice(Answer):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(Answer):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo


class ChatDelta(Answer):
    """What a chunk adds to an answer."""

    role: Annotated[Literal["assistant"] | None, absent_if_none()] = None
    content: Annotated[str | None, absent_if_none()] = None
    tool_calls: Annotated[list[ToolCall] | None, absent_if_none()] = None


class ChatChunkChoice(Answer):
    """A piece of one of `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Answer):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Annotated[UsageInfo | None, absent_if_none()] = None
