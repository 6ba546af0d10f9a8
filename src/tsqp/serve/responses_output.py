"""The answer of `/v1/responses`, and the events of its stream."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Literal

from fastapi import Response as Reply

from tsqp.api.responses import (
    FunctionCall,
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    Response,
    ResponseEvent,
    ResponsesRequest,
    ResponseUsage,
)
from tsqp.runtime.answer_stream import AnswerStream
from tsqp.serve.answer_form import AnswerForm
from tsqp.serve.streaming import in_thread
from tsqp.serve.tool_calls import Call, deltas
from tsqp.serve.tools import Delta
from tsqp.tee.sampling import SamplingParams

Ended = Literal["incomplete", "completed"]
Fields = dict[str, Any]
NO_SCHEMA: Fields = {"parameters": None, "strict": False}  # of a tool that does not say


class ResponseInProgress:
    """One answer, while it is being made.

    Raises:
        PromptError: a parameter is out of range.
    """

    def __init__(self, body: ResponsesRequest, model: str, longest: int, form: AnswerForm) -> None:
        self._body = body
        self._model = model
        self._parser = form.parser()
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._number = -1
        self._items = _Items()
        self.params = SamplingParams(
            max_tokens=body.max_output_tokens or longest,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            **form.fields,
        )

    async def whole(self, stream: AnswerStream) -> Reply:
        """The answer, once it is complete."""
        [completion] = await stream.completions()
        is_cut = completion.finish_reason == "length"
        return await in_thread(partial(self._whole, stream, completion.text, is_cut))

    def _whole(self, stream: AnswerStream, text: str, is_cut: bool) -> Response:
        for delta in deltas(self._parser, text, True):
            for _ in self._items.take(delta):
                pass
        for _ in self._items.end(is_cut):
            pass
        return self._response(stream, is_cut)

    async def events(self, stream: AnswerStream) -> AsyncIterator[ResponseEvent]:
        """The events of a stream."""
        begun = self._response(None)
        yield self._event("created", response=begun)
        yield self._event("in_progress", response=begun)
        is_cut = False
        async for output in stream:
            is_cut = output.finish_reason == "length"
            for delta in deltas(self._parser, output.text, output.finish_reason is not None):
                for kind, fields in self._items.take(delta):
                    yield self._event(kind, **fields)
        for kind, fields in self._items.end(is_cut):
            yield self._event(kind, **fields)
        done = self._response(stream, is_cut)
        yield self._event(done.status, response=done)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=f"response.{kind}", sequence_number=self._number, **fields)

    def _response(self, stream: AnswerStream | None, is_cut: bool = False) -> Response:
        """The answer; without a stream, before there is one."""
        body, usage = self._body, None
        ended: Ended = "incomplete" if is_cut else "completed"
        if stream is not None:
            found = stream.usage
            usage = ResponseUsage(
                input_tokens=found.prompt_tokens,
                input_tokens_details=InputDetails(cached_tokens=found.cached_tokens),
                output_tokens=found.completion_tokens,
                output_tokens_details=OutputDetails(),
                total_tokens=found.prompt_tokens + found.completion_tokens,
            )
        return Response(
            id=self._id,
            created_at=self._created,
            status="in_progress" if stream is None else ended,
            incomplete_details=Incomplete(reason="max_output_tokens") if is_cut else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=self._model,
            output=list(self._items.done),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=self.params.temperature,
            text={"format": (body.text and body.text.format) or {"type": "text"}},
            tool_choice=body.tool_choice or "auto",
            tools=[NO_SCHEMA | tool for tool in body.tools or []],
            top_p=self.params.top_p,
            usage=usage,
        )


class _Items:
    """The items of an answer as it grows. Its methods yield events: their type and fields.

    Attributes:
        done: the items that are complete.
    """

    def __init__(self) -> None:
        self.done: list[OutputItem] = []
        self._open: OutputMessage | FunctionCall | None = None

    def take(self, delta: Delta) -> Iterator[tuple[str, Fields]]:
        """Add what a piece of the answer adds."""
        if delta.name is not None:
            yield from self._begin_call(Call(delta.name))
        elif delta.call is not None:
            assert isinstance(self._open, FunctionCall)
            self._open.arguments += delta.arguments
            yield "function_call_arguments.delta", {**self._place, "delta": delta.arguments}
        else:
            if not isinstance(self._open, OutputMessage):
                yield from self._begin_message()
            assert isinstance(self._open, OutputMessage)
            self._open.content[0].text += delta.content
            yield "output_text.delta", {**self._part, "delta": delta.content, "logprobs": []}

    def end(self, is_cut: bool) -> Iterator[tuple[str, Fields]]:
        """Complete the last item; an answer without any is an empty message."""
        if self._open is None:
            yield from self._begin_message()
        yield from self._close("incomplete" if is_cut else "completed")

    def _begin_message(self) -> Iterator[tuple[str, Fields]]:
        yield from self._close()
        item = OutputMessage(id=_new_id("msg"), status="in_progress", content=[])
        yield "output_item.added", {"output_index": len(self.done), "item": item}
        self._open = item.model_copy(update={"content": [OutputText(text="")]})
        yield "content_part.added", {**self._part, "part": OutputText(text="")}

    def _begin_call(self, call: Call) -> Iterator[tuple[str, Fields]]:
        yield from self._close()
        self._open = FunctionCall(
            id=_new_id("fc"), call_id=call.id, name=call.name, status="in_progress"
        )
        item = self._open.model_copy()
        yield "output_item.added", {"output_index": len(self.done), "item": item}

    def _close(self, status: Ended = "completed") -> Iterator[tuple[str, Fields]]:
        item = self._open
        if item is None:
            return
        item.status = status
        if isinstance(item, OutputMessage):
            part = item.content[0]
            yield "output_text.done", {**self._part, "text": part.text, "logprobs": []}
            yield "content_part.done", {**self._part, "part": part}
        else:
            fields = {"name": item.name, "arguments": item.arguments}
            yield "function_call_arguments.done", {**self._place, **fields}
        yield "output_item.done", {"output_index": len(self.done), "item": item}
        self.done.append(item)
        self._open = None

    @property
    def _place(self) -> Fields:
        assert self._open is not None
        return {"output_index": len(self.done), "item_id": self._open.id}

    @property
    def _part(self) -> Fields:
        return {**self._place, "content_index": 0}


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"
