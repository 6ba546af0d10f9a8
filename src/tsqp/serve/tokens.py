"""`/tokenize`, `/detokenize` and what tells of the server itself."""

from dataclasses import asdict
from functools import partial

from fastapi import APIRouter, Request, Response

import tsqp
from tsqp.api.base import ModelCard, ModelList
from tsqp.api.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    HealthAnswer,
    StatusAnswer,
    TokenizeAnswer,
    TokenizeRequest,
    VersionAnswer,
)
from tsqp.errors import TSQPError
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.documented import ERRORS
from tsqp.serve.errors import RETRY_S, as_api_error, bad_request
from tsqp.serve.logprobs import name_of
from tsqp.serve.metrics import CONTENT_TYPE
from tsqp.serve.params import given_tools
from tsqp.serve.roles import with_known_roles
from tsqp.serve.state import state_of
from tsqp.serve.streaming import in_thread, while_connected
from tsqp.serve.tool_calls import with_objects

router = APIRouter()

MAX_PATH_NAME = 64


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def models(request: Request) -> ModelList:
    """The names of the model."""
    state = state_of(request)
    length = state.ready().max_model_len
    return ModelList(
        data=[
            ModelCard(id=name, created=state.created, root=state.names[0], max_model_len=length)
            for name in state.names
        ]
    )


@router.post("/tokenize", response_model=TokenizeAnswer, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text or a conversation."""
    state = state_of(request)
    llm = state.ready_for_text()
    state.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either a prompt or messages.")
    try:
        with state.texts.let_in(1, request.state.tenant):
            ids = await while_connected(request, _tokenized(llm, body, request.state.tenant))
            return await in_thread(partial(_token_answer, llm, body, ids))
    except TSQPError as error:
        raise as_api_error(error, "prompt" if body.messages is None else "messages") from None


async def _tokenized(llm: AsyncLLM, body: TokenizeRequest, tenant: str) -> list[int]:
    if body.messages is None:
        special = body.add_special_tokens is not False
        return await llm.tokenize(body.prompt or "", add_special_tokens=special, tenant=tenant)
    continues, begins = bool(body.continue_final_message), body.add_generation_prompt
    return await llm.tokenize_chat(
        with_objects(with_known_roles(body.messages, llm.chat_template)),
        tools=given_tools(body.tools),
        split_special=bool(body.split_special),
        add_generation_prompt=not continues if begins is None else begins,
        continue_final_message=continues,
        template_kwargs=body.chat_template_kwargs,
        tenant=tenant,
    )


def _token_answer(llm: AsyncLLM, body: TokenizeRequest, ids: list[int]) -> TokenizeAnswer:
    return TokenizeAnswer(
        count=len(ids),
        max_model_len=llm.max_model_len,
        tokens=ids,
        token_strs=[name_of(llm, each) for each in ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", response_model=DetokenizeAnswer, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeAnswer:
    """The text of token ids."""
    state, tenant = state_of(request), request.state.tenant
    llm = state.ready_for_text()
    state.check_model(body.model)
    try:
        with state.texts.let_in(1, tenant):
            text = await while_connected(request, llm.detokenize(body.tokens, tenant=tenant))
            return DetokenizeAnswer(prompt=text)
    except TSQPError as error:
        raise as_api_error(error, "tokens") from None


@router.get(
    "/health",
    response_model=HealthAnswer,
    responses={503: {"model": HealthAnswer, "description": "It is not ready."}},
)
async def health(request: Request, response: Response) -> HealthAnswer:
    """Whether new requests are answered now. Needs no key."""
    state = state_of(request)
    status = state.status
    if status != "ready":
        response.status_code = 503
        response.headers["Retry-After"] = RETRY_S
    return HealthAnswer(status=status, quarantined=state.quarantined or None)


@router.get("/version", response_model=VersionAnswer, responses=ERRORS)
async def version() -> VersionAnswer:
    """The version of TSQP."""
    return VersionAnswer(version=tsqp.__version__)


@router.get("/v1/tsqp/status", response_model=StatusAnswer, responses=ERRORS)
async def status(request: Request) -> StatusAnswer:
    """How this server computes."""
    state = state_of(request)
    llm = state.ready()
    pads, view, attestation = llm.pads, state.worker_view, state.attestation
    return StatusAnswer.model_validate(
        {
            "status": llm.status,
            "model": state.names[0],
            "version": tsqp.__version__,
            "privacy": llm.privacy,
            "field": llm.field,
            "model_digest": llm.model_digest,
            "transport": llm.transport,
            "transport_reason": llm.transport_reason,
            "workers": [{"state": each.state, "error": each.error} for each in llm.workers],
            "reconnects": llm.reconnects,
            "integrity_failed": llm.status == "failed",
            "integrity_failures": llm.integrity_failures,
            "pads_bytes": None if pads is None else pads.stock_bytes,
            "pads_ahead_rows": None if pads is None else pads.ahead_rows,
            "pads_inline_rows": None if pads is None else pads.inline_rows,
            "placement": asdict(llm.placement),
            "max_model_len": llm.max_model_len,
            "worker_view": view is not None and view.group is not None,
            "attestation": None if attestation is None else attestation.platform,
            "attestation_warning": None if attestation is None else attestation.warning,
            "running": llm.num_running,
            "waiting": llm.num_waiting,
        }
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **ERRORS,
        200: {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
async def metrics(request: Request) -> Response:
    """Metrics in the form of Prometheus."""
    return Response(state_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})
