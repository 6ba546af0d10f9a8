"""`/tokenize`, `/detokenize`, `/version`, `/health` and `/v1/tsqp/status`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tsqp.api.base import MAX_IDS, Answer, Boolean, Integer, RequestBody, absent_if_none
from tsqp.api.chat import Messages
from tsqp.api.tools import Tool


class TokenizeRequest(RequestBody):
    """A text, or a conversation, to turn into token ids; one of the two."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Boolean | None = None
    add_generation_prompt: Boolean | None = None
    continue_final_message: Boolean | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    split_special: Boolean | None = None
    return_token_strs: Boolean | None = None


class TokenizeAnswer(Answer):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Annotated[list[str] | None, absent_if_none()] = None


class DetokenizeRequest(RequestBody):
    """Token ids to turn into text."""

    model: str | None = None
    tokens: Annotated[
        list[Annotated[Integer, Field(ge=0, lt=2**32)]], Field(fail_fast=True, max_length=MAX_IDS)
    ]


class DetokenizeAnswer(Answer):
    """The text, without special tokens."""

    prompt: str


class VersionAnswer(Answer):
    """The version of TSQP."""

    version: str


class HealthAnswer(Answer):
    """Whether requests are answered, in a word."""

    status: str


class StatusAnswer(Answer):
    """How this server computes; nothing in it is about its users.

    Attributes:
        workers: how many there are, without their addresses.
        pads_bytes: size of the masks in stock; null where there are none.
    """

    status: str
    model: str
    version: str
    privacy: Literal["pad", "shares", "open", "tee"]
    field: str | None
    model_digest: str
    transport: str
    transport_reason: str
    workers: int
    reconnects: int
    integrity_failed: bool
    pads_bytes: int | None
    pads_ahead_rows: int | None
    pads_inline_rows: int | None
    placement: dict[str, str]
    max_model_len: int
    running: int
    waiting: int
