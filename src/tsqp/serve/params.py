"""Sampling parameters and usage, as the HTTP interface has them."""

from collections.abc import Iterable

from tsqp.api.base import PromptDetails, SamplingFields, UsageInfo
from tsqp.runtime.answer_stream import AnswerStream
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
) -> SamplingParams:
    """The parameters of a request.

    Raises:
        PromptError: a value is out of range.
    """
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **given, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )


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
