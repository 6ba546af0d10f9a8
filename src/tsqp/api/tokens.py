"""Tokens, and what a server tells of itself: `/health`, `/version`, `/v1/tsqp/…`, evidence."""

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
    """Whether requests are answered, in a word.

    Attributes:
        quarantined: number of workers that are never asked again; absent if there are none.
    """

    status: str
    quarantined: Annotated[int | None, absent_if_none()] = None


class WorkerAnswer(Answer):
    """Whether a worker is used.

    Attributes:
        error: the class of the error that quarantined it.
    """

    state: Literal["in use", "standby", "lost", "quarantined"]
    error: Annotated[str | None, absent_if_none()] = None


class StatusAnswer(Answer):
    """How this server computes; nothing in it is about its users.

    Attributes:
        workers: in the order in which they were given, without their addresses.
        integrity_failed: whether nothing is offloaded any more.
        integrity_failures: how often a wrong answer of a worker was detected.
        pads_bytes: size of the masks in stock; null where there are none.
        worker_view: whether `/v1/tsqp/view/{request_id}` shows what workers received.
        attestation: the platform that gives evidence; null where there is none.
        attestation_warning: a sentence if that evidence proves nothing.
    """

    status: str
    model: str
    version: str
    privacy: Literal["pad", "shares", "open", "tee"]
    field: str | None
    model_digest: str
    transport: str
    transport_reason: str
    workers: list[WorkerAnswer]
    reconnects: int
    integrity_failed: bool
    integrity_failures: int
    pads_bytes: int | None
    pads_ahead_rows: int | None
    pads_inline_rows: int | None
    placement: dict[str, str]
    max_model_len: int
    worker_view: bool
    attestation: str | None
    attestation_warning: str | None
    running: int
    waiting: int


class ViewAnswer(Answer):
    """A sample of what a worker received for a request, and of the values that it stands for.

    Attributes:
        layer, group: the linear layer whose input it is.
        rows: one for each of the last tokens.
        columns: how many values of each row there are.
        masked: what left the trusted side, scaled to bytes; rows * columns of them, in base64.
        plain: what would have left in mode `open`; the same form, and 128 is zero.
    """

    layer: int
    group: str
    rows: int
    columns: int
    masked: str
    plain: str


class AttestationAnswer(Answer):
    """Evidence of the platform; see `tsqp.api.evidence`. Bytes are in base64.

    Attributes:
        configuration: what the claim of that name is the SHA-256 of, as canonical JSON: sorted
            keys, no spaces, UTF-8.
    """

    platform: str
    quote: str
    claims: str
    certificates: str
    configuration: dict[str, Any]
