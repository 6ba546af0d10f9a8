"""`/v1/completions`."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request

from tsqp.api.completions import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from tsqp.errors import TSQPError
from tsqp.runtime.answer_stream import AnswerStream, StreamOutput
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.answer_form import AnswerForm, text_form
from tsqp.serve.documented import STREAM_OR_JSON
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.logprobs import TextOffsets, completion_logprobs
from tsqp.serve.params import (
    check_number,
    check_stream_options,
    given_format,
    sampling_params,
    usage_of,
)
from tsqp.serve.state import state_of
from tsqp.serve.streaming import EventStream, merged, while_connected
from tsqp.tee.sampling import Completion, SamplingParams, TokenLogprobs

router = APIRouter()

PROMPT = "prompt"
MAX_TOKENS = 16


@router.post("/v1/completions", response_model=CompletionAnswer, responses=STREAM_OR_JSON)
async def completions(body: CompletionRequest, request: Request) -> CompletionAnswer | EventStream:
    """Complete one or several prompts."""
    state = state_of(request)
    llm, model = state.ready(), state.check_model(body.model)
    _refuse(body)
    check_stream_options(body)
    if not _has_only_ids(body.prompt):
        state.ready_for_text()
    count = len(body.prompt) if isinstance(body.prompt, list) and not _is_ids(body.prompt) else 1
    check_number(count * (body.n or 1), state.options.most_answers)
    streams: list[AnswerStream] = []
    try:
        form = await asyncio.to_thread(text_form, given_format(body))
        work = Completions(llm, body, model, await _prompts(llm, body), form)
        for stream in work.start(request.state.request_id, request.state.tenant):
            streams.append(stream)
        if not body.stream:
            return await while_connected(request, work.answer(streams))
        for stream in streams:
            await stream.accepted()
        response = EventStream(work.chunks(streams), streams, PROMPT)
        streams = []  # which it closes now
        return response
    except TSQPError as error:
        raise as_api_error(error, PROMPT) from None
    finally:
        for stream in streams:  # the other prompts, when one of them has failed
            await stream.aclose()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, and as text where it is echoed."""

    token_ids: list[int]
    text: str


def _is_ids(prompt: Sequence[object]) -> bool:
    return isinstance(prompt[0], int)


def _has_only_ids(prompt: str | Sequence[object]) -> bool:
    return not isinstance(prompt, str) and not isinstance(prompt[0], str)


async def _prompts(llm: AsyncLLM, body: CompletionRequest) -> list[Prompt]:
    given = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else body.prompt
    prompts = []
    for each in given:
        if isinstance(each, str):
            special = body.add_special_tokens is not False
            prompts.append(Prompt(await llm.tokenize(each, add_special_tokens=special), each))
        else:
            assert isinstance(each, list)
            ids = [token_id for token_id in each if isinstance(token_id, int)]
            in_text = body.echo and llm.has_tokenizer and all(0 <= i < 2**32 for i in ids)
            prompts.append(Prompt(ids, await llm.detokenize(ids) if in_text else ""))
    return prompts


def _refuse(body: CompletionRequest) -> None:
    """Refuse what this server does not do.

    Raises:
        APIError: the request needs it.
    """
    if body.best_of not in (None, body.n or 1):
        raise bad_request("best_of must be equal to n; choose among the answers yourself.")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request(
            "max_tokens must be 1 or more, unless the prompt is echoed.", "max_tokens"
        )
    if body.stream and body.echo and body.logprobs is not None:
        raise bad_request("The logprobs of an echoed prompt cannot be streamed.", "stream")


class Completions:
    """The prompts of one request, while they are being completed."""

    def __init__(
        self,
        llm: AsyncLLM,
        body: CompletionRequest,
        model: str,
        prompts: Sequence[Prompt],
        form: AnswerForm,
    ) -> None:
        self._llm = llm
        self._body = body
        self._prompts = prompts
        self._n = body.n or 1
        self._model = model
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._form = form

    def start(self, request_id: str, tenant: str) -> Iterator[AnswerStream]:
        """Begin with one prompt after the other.

        Raises:
            TSQPError: see `AsyncLLM.add`.
        """
        salt = self._body.cache_salt or ""
        params = self._params()
        for prompt in self._prompts:
            yield self._llm.add(
                prompt.token_ids, params, request_id=request_id, tenant=tenant, cache_salt=salt
            )

    async def answer(self, streams: Sequence[AnswerStream]) -> CompletionAnswer:
        """All answers, once they are complete."""
        choices = []
        for place, stream in enumerate(streams):
            for completion in await stream.completions():
                # An echo has up to 20 names for each token of the prompt: not in the event loop.
                choices.append(await asyncio.to_thread(self._choice, place, completion))
        answer = self._event(choices)
        answer.usage = usage_of(streams)
        if self._is_prompt_only:
            answer.usage.total_tokens -= answer.usage.completion_tokens
            answer.usage.completion_tokens = 0
        return answer

    async def chunks(self, streams: Sequence[AnswerStream]) -> AsyncIterator[CompletionAnswer]:
        """The events of a stream."""
        options = self._body.stream_options
        always = bool(options and options.continuous_usage_stats)
        offsets = [TextOffsets(self._llm) for _ in range(len(streams) * self._n)]
        if self._body.echo:
            for index in range(len(offsets)):
                prompt = self._prompts[index // self._n]
                yield self._event(
                    [CompletionChoice(
                        index=index, text=prompt.text, logprobs=None, finish_reason=None
                    )]
                )  # fmt: skip
        async for place, output in merged(streams):
            choice = self._piece(place, output, offsets)
            if choice is not None:
                event = self._event([choice])
                if always:
                    event.usage = usage_of(streams)
                yield event
        if options and options.include_usage:
            last = self._event([])
            last.usage = usage_of(streams)
            yield last

    @property
    def _is_prompt_only(self) -> bool:
        """Whether nothing is to be generated; one token is, and left out."""
        return self._body.max_tokens == 0

    def _params(self) -> SamplingParams:
        body = self._body
        return sampling_params(
            body,
            max_tokens=MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            form=self._form,
        )

    def _choice(self, place: int, completion: Completion) -> CompletionChoice:
        prompt, body = self._prompts[place], self._body
        ids = [] if self._is_prompt_only else list(completion.token_ids)
        text = "" if self._is_prompt_only else completion.text
        logprobs = None
        if body.logprobs is not None:
            shown = list(ids)
            rated: list[TokenLogprobs | None] = []
            rated += (completion.logprobs or ())[: len(ids)]
            if body.echo:
                shown[:0], rated[:0] = prompt.token_ids, completion.prompt_logprobs or ()
            logprobs = completion_logprobs(self._llm, shown, rated, TextOffsets(self._llm))
        return CompletionChoice(
            index=place * self._n + completion.index,
            text=prompt.text + text if body.echo else text,
            logprobs=logprobs,
            finish_reason="length" if self._is_prompt_only else completion.finish_reason,
            token_ids=ids if body.return_token_ids else None,
        )

    def _piece(
        self, place: int, output: StreamOutput, offsets: list[TextOffsets]
    ) -> CompletionChoice | None:
        """What a stream has more of; None if it is only a piece of a character."""
        index = place * self._n + output.index
        logprobs: CompletionLogprobs | None = None
        if output.logprobs is not None:
            logprobs = completion_logprobs(
                self._llm, output.token_ids, output.logprobs, offsets[index]
            )
        is_shown = output.text or logprobs or output.finish_reason or self._body.return_token_ids
        if not is_shown or (self._is_prompt_only and not output.finish_reason):
            return None
        return CompletionChoice(
            index=index,
            text="" if self._is_prompt_only else output.text,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            token_ids=list(output.token_ids) if self._body.return_token_ids else None,
        )

    def _event(self, choices: list[CompletionChoice]) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._id, created=self._created, model=self._model, choices=choices
        )
