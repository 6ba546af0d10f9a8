"""`/v1/responses`: a translation onto chats that keeps nothing from one request to the next."""

import asyncio

from fastapi import APIRouter, Request
from fastapi import Response as Reply

from tsqp.api.responses import Response, ResponsesRequest
from tsqp.errors import TSQPError
from tsqp.serve.answer_form import AnswerForm, answer_form
from tsqp.serve.documented import STREAM_OR_JSON
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.responses_input import PROMPT, messages_of, tools_of
from tsqp.serve.responses_output import ResponseInProgress
from tsqp.serve.roles import with_known_roles
from tsqp.serve.state import state_of
from tsqp.serve.streaming import EventStream, while_connected
from tsqp.serve.tool_calls import with_objects
from tsqp.serve.tools.response_format import TextFormat

router = APIRouter()


@router.post("/v1/responses", response_model=Response, responses=STREAM_OR_JSON)
async def responses(body: ResponsesRequest, request: Request) -> Reply:
    """Answer a conversation."""
    state = state_of(request)
    llm, model = state.ready_for_text(), state.check_model(body.model)
    _refuse(body)
    messages, tenant = messages_of(body), request.state.tenant

    async def prepare() -> tuple[AnswerForm, list[int]]:
        form = await asyncio.to_thread(
            answer_form,
            llm,
            state.tool_style(),
            None if body.text is None else body.text.format,
            tools_of(body),
            body.tool_choice,
            parallel=body.parallel_tool_calls,
            kind=TextFormat,
        )
        known = with_objects(with_known_roles(messages, llm.chat_template))
        return form, await llm.tokenize_chat(known, tools=form.tools, tenant=tenant)

    try:
        with llm.admit(1, tenant) as place:
            form, ids = await while_connected(request, prepare())
            answer = ResponseInProgress(body, model, llm.max_model_len, form)
            stream = llm.add(
                ids,
                answer.params,
                request_id=request.state.request_id,
                tenant=tenant,
                place=place,
            )
        if body.stream:
            await while_connected(request, stream.accepted())
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
