"""`/v1/completions`."""

from typing import Annotated, Literal

from pydantic import Field

from tsqp.api.base import (
    Answer,
    Boolean,
    Integer,
    SamplingFields,
    TokenIds,
    UsageInfo,
    absent_if_none,
)
from tsqp.api.tools import ResponseFormat, StructuredOutputs

Ids = Annotated[TokenIds, Field(min_length=1)]
Prompts = (
    str
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=1024)]
)


class CompletionRequest(SamplingFields):
    """One or several prompts to complete; each is a text or token ids."""

    prompt: Prompts
    echo: Boolean | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[Integer, Field(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: Boolean | None = None
    return_token_ids: Boolean | None = None


class CompletionLogprobs(Answer):
    """The tokens of a text: their own names, probabilities and places, one for each.

    The first token of an echoed prompt has no probability.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One answer to one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "error"] | None
    token_ids: Annotated[list[int] | None, absent_if_none()] = None


class CompletionAnswer(Answer):
    """The answers to all prompts; an event of a stream has the same form."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Annotated[UsageInfo | None, absent_if_none()] = None
