"""Sampling parameters and usage, as the HTTP interface has them."""

from collections.abc import Iterable, Sequence
from typing import Any

from tsqp.api.base import PromptDetails, SamplingFields, UsageInfo
from tsqp.api.chat import ChatRequest
from tsqp.api.completions import CompletionRequest
from tsqp.api.tools import Tool
from tsqp.runtime.answer_stream import AnswerStream
from tsqp.serve.answer_form import ANY_TEXT, AnswerForm
from tsqp.serve.errors import bad_request
from tsqp.tee.sampling import SamplingParams

_SAME = (
    "temperature", "top_p", "top_k", "min_p", "n", "min_tokens", "stop", "stop_token_ids", "seed",
    "ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
)  # fmt: skip


def sampling_params(
    body: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    form: AnswerForm = ANY_TEXT,
) -> SamplingParams:
    """The parameters of a request.

    Raises:
        PromptError: a value is out of range.
    """
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **given,
        **form.fields,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def given_format(body: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    """The `response_format` of a request, as it was sent."""
    given = body.response_format
    return None if given is None else given.model_dump(by_alias=True, exclude_unset=True)


def given_outputs(body: ChatRequest | CompletionRequest) -> dict[str, Any] | None:
    """The `structured_outputs` of a request, without nulls; None where there are none."""
    given = body.structured_outputs
    return None if given is None else given.model_dump(by_alias=True, exclude_none=True)


def given_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The `tools` of a request, as they were sent; null where there are none."""
    return [tool.model_dump(exclude_unset=True) for tool in tools] if tools else None


def check_number(answers: int, most: int) -> None:
    """Refuse a request that would never fit.

    Raises:
        APIError: it wants too many answers.
    """
    if answers > most:
        raise bad_request(
            f"The request asks for {answers} answers, and this server computes at most {most} "
            "at a time: ask for fewer.",
            "n",
        )


def check_stream_options(body: SamplingFields) -> None:
    """As OpenAI has it.

    Raises:
        APIError: there are options of a stream, and no stream.
    """
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options is only allowed with stream.", "stream_options")


def usage_of(streams: Iterable[AnswerStream]) -> UsageInfo:
    """The numbers of tokens of the answers so far; each prompt counts once."""
    prompt = completion = cached = 0
    for stream in streams:
        usage = stream.usage
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
    return UsageInfo(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )
