"""Answers that end when the client hangs up, as one body or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tsqp.runtime.answer_stream import AnswerStream, StreamOutput
from tsqp.serve.errors import APIError, as_api_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
CLIENT_GONE = 499  # nobody sees it
MANY = 32  # tokens whose probabilities take too long to write in the event loop

Event = BaseModel | Callable[[], BaseModel]  # a function is called in a thread


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work, unless the client hangs up before it is done; then the work is cancelled."""
    return await _race(request.receive, work)


async def in_thread(make: Callable[[], BaseModel]) -> Response:
    """An answer that is made, and written as JSON, in a thread: a long one takes a while."""
    body = await asyncio.to_thread(lambda: make().model_dump_json().encode())
    return Response(body, media_type="application/json")


class EventStream(Response):
    """Server-sent events, which end in [DONE].

    Args:
        events: models to send, or functions that make them and take a while. An error becomes the
            last event.
        streams: are given up when the client hangs up.
        param: the field with the prompt.
        named: events have their type as a name, and no [DONE] follows, as `/v1/responses` has it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Event],
        streams: Sequence[AnswerStream],
        param: str,
        *,
        named: bool = False,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._streams = streams
        self._param = param
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(APIError):  # nobody is there any more
                await _race(receive, self._send(send))
        finally:
            for stream in self._streams:
                await stream.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                if isinstance(event, BaseModel):
                    part = self._part(event)
                else:
                    part = await asyncio.to_thread(self._made, event)
                await _send_part(send, part)
        except Exception as error:
            body = as_api_error(error, self._param).body
            if self._named:
                details = {"type": "error", **body.error.model_dump(exclude={"type"})}
                await _send_part(send, f"event: error\ndata: {json.dumps(details)}\n\n".encode())
            else:
                await _send_part(send, f"data: {body.model_dump_json()}\n\n".encode())
        if not self._named:
            await _send_part(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _part(self, event: BaseModel) -> bytes:
        name = f"event: {getattr(event, 'type', '')}\n" if self._named else ""
        return f"{name}data: {event.model_dump_json()}\n\n".encode()

    def _made(self, make: Callable[[], BaseModel]) -> bytes:
        return self._part(make())


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _race(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(CLIENT_GONE, "The client has hung up.")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(streams: Sequence[AnswerStream]) -> AsyncIterator[tuple[int, StreamOutput]]:
    """The outputs of several streams as they come, each with the number of its stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    outputs: asyncio.Queue[tuple[int, StreamOutput | Exception | None]] = asyncio.Queue()

    async def pump(number: int, stream: AnswerStream) -> None:
        try:
            async for output in stream:
                outputs.put_nowait((number, output))
            outputs.put_nowait((number, None))
        except Exception as error:
            outputs.put_nowait((number, error))

    tasks = [asyncio.ensure_future(pump(*each)) for each in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            number, item = await outputs.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
