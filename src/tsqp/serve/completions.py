"""`/v1/completions`."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, Request, Response

from tsqp.api.base import UsageInfo
from tsqp.api.completions import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from tsqp.errors import TSQPError
from tsqp.runtime.admission import Place
from tsqp.runtime.answer_stream import AnswerStream, StreamOutput
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.answer_form import ANY_TEXT, text_form
from tsqp.serve.documented import STREAM_OR_JSON
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.logprobs import TextOffsets, completion_logprobs
from tsqp.serve.params import (
    check_number,
    check_stream_options,
    given_format,
    given_outputs,
    sampling_params,
    usage_of,
)
from tsqp.serve.state import state_of
from tsqp.serve.streaming import (
    MANY,
    Event,
    EventStream,
    in_thread,
    merged,
    while_connected,
)
from tsqp.tee.sampling import Completion, SamplingParams, TokenLogprobs

router = APIRouter()

PROMPT = "prompt"
MAX_TOKENS = 16


@router.post("/v1/completions", response_model=CompletionAnswer, responses=STREAM_OR_JSON)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Complete one or several prompts."""
    state = state_of(request)
    llm, model = state.ready(), state.check_model(body.model)
    _refuse(body)
    check_stream_options(body)
    if not _has_only_ids(body.prompt):
        state.ready_for_text()
    count = len(body.prompt) if isinstance(body.prompt, list) and not _is_ids(body.prompt) else 1
    check_number(count * (body.n or 1), state.options.most_answers)
    tenant = request.state.tenant
    streams: list[AnswerStream] = []
    try:
        with llm.admit(count * (body.n or 1), tenant) as place:
            work = Completions(llm, body, model, tenant)
            await while_connected(request, work.prepare())
            for stream in work.start(request.state.request_id, place):
                streams.append(stream)
        if not body.stream:
            return await while_connected(request, work.answer(streams))
        for stream in streams:
            await while_connected(request, stream.accepted())
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


async def _prompts(llm: AsyncLLM, body: CompletionRequest, tenant: str) -> list[Prompt]:
    given = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else body.prompt
    prompts = []
    for each in given:
        if isinstance(each, str):
            special = body.add_special_tokens is not False
            ids = await llm.tokenize(each, add_special_tokens=special, tenant=tenant)
            prompts.append(Prompt(ids, each))
        else:
            assert isinstance(each, list)
            ids = [token_id for token_id in each if isinstance(token_id, int)]
            in_text = body.echo and llm.has_tokenizer and all(0 <= i < 2**32 for i in ids)
            text = await llm.detokenize(ids, tenant=tenant) if in_text else ""
            prompts.append(Prompt(ids, text))
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


class Completions:
    """The prompts of one request, while they are being completed."""

    def __init__(self, llm: AsyncLLM, body: CompletionRequest, model: str, tenant: str) -> None:
        self._llm = llm
        self._body = body
        self._prompts: list[Prompt] = []
        self._n = body.n or 1
        self._model = model
        self._tenant = tenant
        self._id = f"cmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._form = ANY_TEXT

    async def prepare(self) -> None:
        """Find out which form the answers have, and tokenize the prompts.

        Raises:
            APIError: the format is wrong.
            PromptError, TokenizerError: see `AsyncLLM.tokenize`.
        """
        body = self._body
        self._form = await asyncio.to_thread(
            text_form, given_format(body), outputs=given_outputs(body)
        )
        self._prompts = await _prompts(self._llm, body, self._tenant)

    def start(self, request_id: str, place: Place) -> Iterator[AnswerStream]:
        """Begin with one prompt after the other.

        Raises:
            TSQPError: see `AsyncLLM.add`.
        """
        params = self._params()
        for prompt in self._prompts:
            yield self._llm.add(
                prompt.token_ids,
                params,
                request_id=request_id,
                tenant=self._tenant,
                cache_salt=self._body.cache_salt or "",
                place=place,
            )

    async def answer(self, streams: Sequence[AnswerStream]) -> Response:
        """All answers, once they are complete."""
        completions = [await stream.completions() for stream in streams]
        return await in_thread(partial(self._answer, streams, completions))

    def _answer(
        self, streams: Sequence[AnswerStream], completions: Sequence[Sequence[Completion]]
    ) -> CompletionAnswer:
        return self._event(
            [
                self._choice(place, each, TextOffsets(self._llm), is_first=True)
                for place, answers in enumerate(completions)
                for each in answers
            ],
            self._usage(streams),
        )

    async def chunks(self, streams: Sequence[AnswerStream]) -> AsyncIterator[Event]:
        """The events of a stream. An echo comes with the first piece of an answer."""
        options = self._body.stream_options
        always = bool(options and options.continuous_usage_stats)
        offsets: dict[int, TextOffsets] = {}
        async for place, output in merged(streams):
            index = place * self._n + output.index
            is_first = index not in offsets
            of_text = offsets.setdefault(index, TextOffsets(self._llm))
            if not self._is_shown(output, is_first):
                continue
            usage = self._usage(streams) if always else None
            make = partial(self._piece, place, output, of_text, is_first, usage)
            rated = len(output.logprobs or ()) + len(output.prompt_logprobs or ())
            yield make if rated > MANY else make()
        if options and options.include_usage:
            yield self._event([], self._usage(streams))

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

    def _is_shown(self, output: StreamOutput, is_first: bool) -> bool:
        """Whether an output has something to send; it may be only a piece of a character."""
        body = self._body
        return bool(
            (is_first and body.echo)
            or output.text
            or output.logprobs
            or output.finish_reason
            or body.return_token_ids
        )

    def _piece(
        self,
        place: int,
        output: StreamOutput,
        offsets: TextOffsets,
        is_first: bool,
        usage: UsageInfo | None,
    ) -> CompletionAnswer:
        return self._event([self._choice(place, output, offsets, is_first=is_first)], usage)

    def _choice(
        self, place: int, part: Completion | StreamOutput, offsets: TextOffsets, *, is_first: bool
    ) -> CompletionChoice:
        """An answer, or a piece of one."""
        prompt, body = self._prompts[place], self._body
        ids, text, reason = list(part.token_ids), part.text, part.finish_reason
        rated: list[TokenLogprobs | None] = list(part.logprobs or ())
        if self._is_prompt_only:
            ids, text, reason, rated = [], "", "length", []
        shown = ids
        if body.echo and is_first:
            text, shown = prompt.text + text, prompt.token_ids + ids
            rated = [*(part.prompt_logprobs or ()), *rated]
        logprobs: CompletionLogprobs | None = None
        if body.logprobs is not None:
            logprobs = completion_logprobs(self._llm, shown, rated, offsets)
        return CompletionChoice(
            index=place * self._n + part.index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            token_ids=ids if body.return_token_ids else None,
        )

    def _usage(self, streams: Sequence[AnswerStream]) -> UsageInfo:
        usage = usage_of(streams)
        if self._is_prompt_only:
            usage.total_tokens -= usage.completion_tokens
            usage.completion_tokens = 0
        return usage

    def _event(
        self, choices: list[CompletionChoice], usage: UsageInfo | None = None
    ) -> CompletionAnswer:
        return CompletionAnswer(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )
