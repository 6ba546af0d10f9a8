"""`/v1/chat/completions`."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request

from tsqp.api.chat import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
)
from tsqp.errors import TSQPError
from tsqp.runtime.answer_stream import AnswerStream
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.documented import STREAM_OR_JSON
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.logprobs import chat_logprobs
from tsqp.serve.params import check_number, check_stream_options, sampling_params, usage_of
from tsqp.serve.state import state_of
from tsqp.serve.streaming import EventStream, while_connected
from tsqp.tee.sampling import Completion, SamplingParams, TokenLogprobs

router = APIRouter()

PROMPT = "messages"


@router.post("/v1/chat/completions", response_model=ChatAnswer, responses=STREAM_OR_JSON)
async def chat_completions(body: ChatRequest, request: Request) -> ChatAnswer | EventStream:
    """Answer a conversation."""
    state = state_of(request)
    llm, model = state.ready_for_text(), state.check_model(body.model)
    refuse_what_is_missing(body)
    check_stream_options(body)
    check_number(body.n or 1, state.options.most_answers)
    chat = Chat(llm, body, model)
    try:
        stream = await chat.start(
            request.state.request_id, request.state.tenant, await chat.tokenize()
        )
        if body.stream:
            await stream.accepted()
            return EventStream(chat.chunks(stream), [stream], PROMPT)
        return chat.answer(await while_connected(request, stream.completions()), stream)
    except TSQPError as error:
        raise as_api_error(error, PROMPT) from None


def refuse_what_is_missing(body: ChatRequest) -> None:
    """Refuse forms and tools, which nothing here can enforce yet.

    Raises:
        APIError: the request needs them.
    """
    if body.response_format is not None and body.response_format.type != "text":
        raise bad_request(
            "This server does not support a response_format other than text.", "response_format"
        )
    if body.tools and body.tool_choice != "none":
        raise bad_request(
            "This server does not support tools; leave them out, or set tool_choice to none.",
            "tools",
        )
    if not body.tools and body.tool_choice not in (None, "none", "auto"):
        raise bad_request("tool_choice is only allowed with tools.", "tool_choice")


class Chat:
    """One conversation that is being answered."""

    def __init__(self, llm: AsyncLLM, body: ChatRequest, model: str) -> None:
        self._llm = llm
        self._body = body
        self._model = model
        self._id = f"chatcmpl-{secrets.token_hex(16)}"
        self._created = int(time.time())

    async def tokenize(self) -> list[int]:
        """The token ids of the conversation.

        Raises:
            PromptError, TokenizerError: see `AsyncLLM.tokenize_chat`.
        """
        body, continues = self._body, bool(self._body.continue_final_message)
        begins = body.add_generation_prompt
        return await self._llm.tokenize_chat(
            body.messages,
            split_special=bool(body.split_special),
            add_generation_prompt=not continues if begins is None else begins,
            continue_final_message=continues,
            template_kwargs=body.chat_template_kwargs,
        )

    async def start(self, request_id: str, tenant: str, token_ids: Sequence[int]) -> AnswerStream:
        """Begin to answer.

        Raises:
            TSQPError: see `AsyncLLM.add`.
        """
        return self._llm.add(
            token_ids,
            self._params(),
            request_id=request_id,
            tenant=tenant,
            cache_salt=self._body.cache_salt or "",
        )

    def answer(self, completions: Sequence[Completion], stream: AnswerStream) -> ChatAnswer:
        """The answers, once they are complete."""
        return ChatAnswer(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=each.index,
                    message=ChatMessage(content=each.text),
                    logprobs=self._logprobs(each.logprobs),
                    finish_reason=each.finish_reason,
                )
                for each in completions
            ],
            usage=usage_of([stream]),
        )

    async def chunks(self, stream: AnswerStream) -> AsyncIterator[ChatChunk]:
        """The events of a stream."""
        options = self._body.stream_options
        always = bool(options and options.continuous_usage_stats)
        for index in range(self._body.n or 1):
            first = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
            yield self._chunk(first, stream if always else None)
        async for output in stream:
            logprobs = self._logprobs(output.logprobs)
            if not output.text and logprobs is None and output.finish_reason is None:
                continue  # a piece of a character
            piece = ChatChunkChoice(
                index=output.index,
                delta=ChatDelta(content=output.text),
                logprobs=logprobs,
                finish_reason=output.finish_reason,
            )
            yield self._chunk(piece, stream if always else None)
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
        )

    def _logprobs(self, tokens: Sequence[TokenLogprobs] | None) -> ChatLogprobs | None:
        return None if tokens is None else chat_logprobs(self._llm, tokens)
