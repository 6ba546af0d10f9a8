"""What all requests and answers of the HTTP interface have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

# JSON has numbers, and "1" and true are none of them.
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Boolean = Annotated[bool, Strict()]
# Lists of clients end at the first wrong item: an error for each would block the event loop.
MAX_IDS = 2**20
TokenIds = Annotated[list[Integer], Field(fail_fast=True, max_length=MAX_IDS)]

MAX_INTEGER = 2**63
MAX_BIASES = 1024
MAX_STOP_CHARACTERS = 1024
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=16)]


def _bounded(biases: object) -> object:
    """Refuse too many entries before each is checked."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"there are more than {MAX_BIASES} entries")
    return biases


def absent_if_none() -> Any:
    """Of a field of an answer that is left out rather than null."""
    return Field(exclude_if=lambda value: value is None)


class RequestBody(BaseModel):
    """A request. Fields that this server does not know are ignored.

    An error must never show what was sent: see `tsqp.serve.errors`.
    """

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True, protected_namespaces=())


class Answer(BaseModel):
    """An answer, or a part of one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetails(Answer):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The body of every answer with a status of 400 or above."""

    error: ErrorDetails


class StreamOptions(RequestBody):
    """What a stream sends besides the answer.

    Attributes:
        include_usage: a last chunk without choices has the usage.
        continuous_usage_stats: every chunk has the usage so far.
    """

    include_usage: Boolean | None = None
    continuous_usage_stats: Boolean | None = None


class PromptDetails(Answer):
    """Of the tokens of a prompt."""

    cached_tokens: int


class UsageInfo(Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class SamplingFields(RequestBody):
    """The sampling parameters that chats and completions share; see `tsqp.SamplingParams`."""

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    n: Annotated[Integer, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[Integer, Field(ge=0, le=MAX_INTEGER)] | None = None
    min_tokens: Annotated[Integer, Field(ge=0, le=MAX_INTEGER)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = (
        None
    )
    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = None
    seed: Integer | None = None
    ignore_eos: Boolean | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(_bounded)] | None = None
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    user: Any = None


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "tsqp"
    root: str
    max_model_len: int


class ModelList(Answer):
    """The models that are served: one, under each of its names."""

    object: str = "list"
    data: list[ModelCard]
