"""`/v1/responses`: a translation onto chats that keeps nothing from one request to the next."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request

from tsqp.api.responses import (
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    Response,
    ResponseEvent,
    ResponsesRequest,
    ResponseUsage,
)
from tsqp.errors import TSQPError
from tsqp.runtime.answer_stream import AnswerStream
from tsqp.serve.documented import STREAM_OR_JSON
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.state import state_of
from tsqp.serve.streaming import EventStream, while_connected
from tsqp.tee.sampling import SamplingParams

router = APIRouter()

PROMPT = "input"
TEXT_PARTS = ("input_text", "output_text", "text")
ROLES = {"developer": "system"}  # templates know the older name


@router.post("/v1/responses", response_model=Response, responses=STREAM_OR_JSON)
async def responses(body: ResponsesRequest, request: Request) -> Response | EventStream:
    """Answer a conversation."""
    state = state_of(request)
    llm, model = state.ready_for_text(), state.check_model(body.model)
    _refuse(body)
    messages = _messages(body)
    try:
        ids = await llm.tokenize_chat(messages)
        answer = _Response(body, model, llm.max_model_len)
        stream = llm.add(
            ids, answer.params, request_id=request.state.request_id, tenant=request.state.tenant
        )
        if body.stream:
            await stream.accepted()
            return EventStream(answer.events(stream), [stream], PROMPT, named=True)
        return await while_connected(request, answer.whole(stream))
    except TSQPError as error:
        raise as_api_error(error, PROMPT) from None


def _refuse(body: ResponsesRequest) -> None:
    """Refuse what needs a state, or what this server does not do.

    Raises:
        APIError: the request has it.
    """
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise bad_request(
                f"This server keeps no conversations, so there is no {name}: send all messages as "
                "input.",
                name,
            )
    if body.background:
        raise bad_request("This server does not answer in the background.", "background")
    if body.tools and body.tool_choice != "none":
        raise bad_request(
            "This server does not support tools; leave them out, or set tool_choice to none.",
            "tools",
        )
    form = body.text and body.text.format
    if form and form.get("type") != "text":
        raise bad_request("This server does not support a text.format other than text.", "text")


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation, as chats have it.

    Raises:
        APIError: an item is not a message of text.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for number, item in enumerate(body.input):
        if item.get("type") == "reasoning":
            continue  # of an earlier answer, which no model wants back
        if item.get("type", "message") != "message" or not isinstance(item.get("role"), str):
            raise bad_request(
                f"Item {number} of the input is not a message with a role, and nothing else is "
                "supported.",
                PROMPT,
            )
        role = ROLES.get(item["role"], item["role"])
        messages.append({"role": role, "content": _content(item.get("content"), number)})
    if not messages:
        raise bad_request("The input has no messages.", PROMPT)
    return messages


def _content(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part.get("type") not in TEXT_PARTS or text is None:
            raise bad_request(f"Item {number} of the input has content that is not text.", PROMPT)
        if not isinstance(text, str):
            raise bad_request(f"Item {number} of the input has content that is not text.", PROMPT)
        texts.append(text)
    return "\n".join(texts)


class _Response:
    """One answer, while it is being made.

    Raises:
        PromptError: a parameter is out of range.
    """

    def __init__(self, body: ResponsesRequest, model: str, longest: int) -> None:
        self._body = body
        self._model = model
        self._id, self._item = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._number = -1
        self.params = SamplingParams(
            max_tokens=body.max_output_tokens or longest,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
        )

    async def whole(self, stream: AnswerStream) -> Response:
        """The answer, once it is complete."""
        [completion] = await stream.completions()
        return self._response(stream, completion.text, completion.finish_reason == "length")

    async def events(self, stream: AnswerStream) -> AsyncIterator[ResponseEvent]:
        """The events of a stream."""
        begun = self._response(None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = OutputMessage(id=self._item, status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=0, item=item)
        place = {"output_index": 0, "item_id": self._item, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=OutputText(text=""))
        text, is_cut = "", False
        async for output in stream:
            text += output.text
            is_cut = output.finish_reason == "length"
            if output.text:
                yield self._event(
                    "response.output_text.delta", **place, delta=output.text, logprobs=[]
                )
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=OutputText(text=text))
        done = self._response(stream, text, is_cut)
        yield self._event("response.output_item.done", output_index=0, item=done.output[0])
        yield self._event(f"response.{done.status}", response=done)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=kind, sequence_number=self._number, **fields)

    def _response(
        self, stream: AnswerStream | None, text: str = "", is_cut: bool = False
    ) -> Response:
        """The answer; without a stream, before there is one."""
        ended: Literal["incomplete", "completed"] = "incomplete" if is_cut else "completed"
        usage, output = None, []
        if stream is not None:
            found = stream.usage
            usage = ResponseUsage(
                input_tokens=found.prompt_tokens,
                input_tokens_details=InputDetails(cached_tokens=found.cached_tokens),
                output_tokens=found.completion_tokens,
                output_tokens_details=OutputDetails(),
                total_tokens=found.prompt_tokens + found.completion_tokens,
            )
            output = [
                OutputMessage(
                    id=self._item,
                    status=ended,
                    content=[OutputText(text=text)],
                )
            ]
        return Response(
            id=self._id,
            created_at=self._created,
            status="in_progress" if stream is None else ended,
            incomplete_details=Incomplete(reason="max_output_tokens") if is_cut else None,
            instructions=self._body.instructions,
            max_output_tokens=self._body.max_output_tokens,
            model=self._model,
            output=output,
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            usage=usage,
        )
