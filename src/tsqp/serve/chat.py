"""`/v1/chat/completions`."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import overload

from fastapi import APIRouter, Request, Response

from tsqp.api.chat import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    FinishReason,
)
from tsqp.api.tools import CalledFunction, NamedTool, ToolCall
from tsqp.errors import TSQPError
from tsqp.runtime.admission import Place
from tsqp.runtime.answer_stream import AnswerStream, StreamOutput
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.answer_form import ANY_TEXT, answer_form
from tsqp.serve.documented import STREAM_OR_JSON
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.logprobs import chat_logprobs
from tsqp.serve.params import (
    check_number,
    check_stream_options,
    given_format,
    given_outputs,
    given_tools,
    sampling_params,
    usage_of,
)
from tsqp.serve.roles import with_known_roles
from tsqp.serve.state import State, state_of
from tsqp.serve.streaming import MANY, Event, EventStream, in_thread, while_connected
from tsqp.serve.tool_calls import Call, collect, deltas, with_objects
from tsqp.serve.tools import ToolParser
from tsqp.tee.sampling import Completion, SamplingParams, TokenLogprobs

router = APIRouter()

PROMPT = "messages"


@router.post("/v1/chat/completions", response_model=ChatAnswer, responses=STREAM_OR_JSON)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    llm, model = state.ready_for_text(), state.check_model(body.model)
    check_stream_options(body)
    check_number(body.n or 1, state.options.most_answers)
    tenant = request.state.tenant
    try:
        with llm.admit(body.n or 1, tenant) as place:
            chat = Chat(llm, body, model, tenant)
            await while_connected(request, chat.prepare(state))
            stream = chat.start(request.state.request_id, place)
        if body.stream:
            await while_connected(request, stream.accepted())
            return EventStream(chat.chunks(stream), [stream], PROMPT)
        return await while_connected(request, chat.answer(stream))
    except TSQPError as error:
        raise as_api_error(error, PROMPT) from None


class Chat:
    """One conversation that is being answered."""

    def __init__(self, llm: AsyncLLM, body: ChatRequest, model: str, tenant: str) -> None:
        self._llm = llm
        self._body = body
        self._model = model
        self._tenant = tenant
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._form = ANY_TEXT
        self._token_ids: list[int] = []

    async def prepare(self, state: State) -> None:
        """Find out which form the answer has, and tokenize the conversation.

        Raises:
            APIError: the format, the tools or the choice of one are wrong.
            PromptError, TokenizerError: see `AsyncLLM.tokenize_chat` and `with_objects`.
        """
        body, continues = self._body, bool(self._body.continue_final_message)
        choice, begins = body.tool_choice, body.add_generation_prompt
        self._form = await asyncio.to_thread(
            answer_form,
            self._llm,
            state.tool_style(),
            given_format(body),
            given_tools(body.tools),
            choice.model_dump() if isinstance(choice, NamedTool) else choice,
            parallel=body.parallel_tool_calls,
            outputs=given_outputs(body),
        )
        messages = with_known_roles(body.messages, self._llm.chat_template)
        self._token_ids = await self._llm.tokenize_chat(
            with_objects(messages),
            tools=self._form.tools,
            split_special=bool(body.split_special),
            add_generation_prompt=not continues if begins is None else begins,
            continue_final_message=continues,
            template_kwargs=body.chat_template_kwargs,
            tenant=self._tenant,
        )

    def start(self, request_id: str, place: Place) -> AnswerStream:
        """Begin to answer.

        Raises:
            TSQPError: see `AsyncLLM.add`.
        """
        return self._llm.add(
            self._token_ids,
            self._params(),
            request_id=request_id,
            tenant=self._tenant,
            cache_salt=self._body.cache_salt or "",
            place=place,
        )

    async def answer(self, stream: AnswerStream) -> Response:
        """The answers, once they are complete."""
        completions = await stream.completions()
        return await in_thread(partial(self._answer, completions, stream))

    def _answer(self, completions: Sequence[Completion], stream: AnswerStream) -> ChatAnswer:
        return ChatAnswer(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(each) for each in completions],
            usage=usage_of([stream]),
        )

    def _choice(self, completion: Completion) -> ChatChoice:
        content, calls = collect(self._form.parser(), completion.text)
        return ChatChoice(
            index=completion.index,
            message=ChatMessage(
                content=None if calls and not content else content,
                tool_calls=[_called(call) for call in calls] or None,
            ),
            logprobs=self._logprobs(completion.logprobs),
            finish_reason=_reason(completion.finish_reason, bool(calls)),
        )

    async def chunks(self, stream: AnswerStream) -> AsyncIterator[Event]:
        """The events of a stream."""
        options = self._body.stream_options
        always = bool(options and options.continuous_usage_stats)
        for index in range(self._body.n or 1):
            first = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
            yield self._chunk(first, stream if always else None)
        pieces = [Pieces(self._form.parser()) for _ in range(self._body.n or 1)]
        async for output in stream:
            rated = output.logprobs
            choices = [
                ChatChunkChoice(index=output.index, delta=delta)
                for delta in pieces[output.index].take(output)
            ]
            if output.finish_reason is not None or (rated is not None and not choices):
                reason = _reason(output.finish_reason, bool(pieces[output.index].calls))
                choices.append(
                    ChatChunkChoice(index=output.index, delta=ChatDelta(), finish_reason=reason)
                )
            for choice in choices:
                chunk = self._chunk(choice, stream if always else None)
                if rated is not None and len(rated) > MANY:
                    yield partial(self._rated, chunk, rated)
                else:
                    yield self._rated(chunk, rated)
                rated = None
        if options and options.include_usage:
            yield self._chunk(None, stream)

    def _chunk(self, choice: ChatChunkChoice | None, stream: AnswerStream | None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[] if choice is None else [choice],
            usage=None if stream is None else usage_of([stream]),
        )

    def _rated(self, chunk: ChatChunk, tokens: Sequence[TokenLogprobs] | None) -> ChatChunk:
        """The chunk, with the probabilities of its tokens."""
        if tokens is not None:
            chunk.choices[0].logprobs = self._logprobs(tokens)
        return chunk

    def _params(self) -> SamplingParams:
        body = self._body
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
        wanted = body.max_completion_tokens
        return sampling_params(
            body,
            max_tokens=next(
                (each for each in (wanted, body.max_tokens) if each is not None),
                self._llm.max_model_len,
            ),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            form=self._form,
        )

    def _logprobs(self, tokens: Sequence[TokenLogprobs] | None) -> ChatLogprobs | None:
        return None if tokens is None else chat_logprobs(self._llm, tokens)


class Pieces:
    """What the chunks of one answer add to it.

    Attributes:
        calls: number of calls so far.
    """

    def __init__(self, parser: ToolParser | None) -> None:
        self._parser = parser
        self.calls = 0

    def take(self, output: StreamOutput) -> Iterator[ChatDelta]:
        """What a piece of the answer adds."""
        for delta in deltas(self._parser, output.text, output.finish_reason is not None):
            if delta.name is not None:
                self.calls += 1
                yield ChatDelta(tool_calls=[_called(Call(delta.name), delta.call)])
            elif delta.call is not None:
                more = CalledFunction(arguments=delta.arguments)
                yield ChatDelta(tool_calls=[ToolCall(index=delta.call, function=more)])
            else:
                yield ChatDelta(content=delta.content)


def _called(call: Call, index: int | None = None) -> ToolCall:
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return ToolCall(index=index, id=call.id, type="function", function=function)


@overload
def _reason(given: FinishReason, called: bool) -> FinishReason: ...
@overload
def _reason(given: FinishReason | None, called: bool) -> FinishReason | None: ...
def _reason(given: FinishReason | None, called: bool) -> FinishReason | None:
    """OpenAI has a reason of its own for an answer that ends with calls."""
    return "tool_calls" if called and given == "stop" else given
