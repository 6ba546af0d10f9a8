"""Errors in OpenAI's form. None of them shows anything of what a client sent."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tsqp.api.base import ErrorAnswer, ErrorDetails
from tsqp.errors import (
    IntegrityError,
    LatticeError,
    OutOfMemory,
    PromptError,
    PromptTooLong,
    QueueFull,
    TokenizerError,
    TSQPError,
    UsageError,
    WorkerError,
)
from tsqp.runtime.tracebacks import without_foreign_messages

log = logging.getLogger("tsqp")

INVALID = "invalid_request_error"
SERVER = "server_error"
WRONG = "invalid_value"  # the code of a wrong field
RETRY_S = "1"

_HTTP = {
    404: "There is no such endpoint.",
    405: "This endpoint does not take this method.",
    413: "The body of the request is too large.",
}


class APIError(Exception):
    """An error that a client sees.

    Args:
        message: one sentence, without anything that the client sent.
        param: the field that is wrong.
        code: OpenAI's name of the error, where it has one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorAnswer(
            error=ErrorDetails(message=message, type=kind, param=param, code=code)
        )

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The client has to change its request."""
    return APIError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> APIError:
    """The client may try again later."""
    return APIError(503, message, kind=SERVER, code=code, headers={"Retry-After": RETRY_S})


def as_api_error(error: Exception, param: str | None = None) -> APIError:
    """What a client is told of an error.

    Args:
        param: the field with the prompt.
    """
    match error:
        case APIError():
            return error
        case PromptTooLong():
            return bad_request(str(error), param, "context_length_exceeded")
        case PromptError():
            first = str(error).split(" ", 1)[0]
            named = first if first.split(".")[0] in FIELDS else param
            return bad_request(str(error), named, WRONG)
        case TokenizerError():
            return bad_request(str(error), param)
        case QueueFull():
            return unavailable(str(error), "queue_full")
        case IntegrityError() | LatticeError():  # for good, so no client should try again
            log.error("request failed: %s", error)
            return APIError(
                503,
                "Nothing is computed any more after a wrong result; restart the server.",
                kind=SERVER,
                code="failed",
            )
        case WorkerError():  # whose messages name endpoints
            log.error("request failed: %s", error)
            return unavailable("The worker failed, so there is no answer.", "worker_error")
        case OutOfMemory():
            return unavailable("There is not enough memory for this request.", "out_of_memory")
        case UsageError():
            return unavailable("The server is shutting down.", "shutting_down")
        case TSQPError():
            log.error("request failed: %s", error)
        case _:
            log.error("request failed:\n%s", without_foreign_messages(error).rstrip())
    return APIError(500, "The server failed; its log has the reason.", kind=SERVER)


def install(app: FastAPI) -> None:
    """Let an app answer all errors in OpenAI's form."""

    async def own(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors()).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = _HTTP.get(error.status_code, "The request cannot be read.")
        return APIError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(APIError, own)
    app.add_exception_handler(TSQPError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


FIELDS: set[str] = set()  # of all requests: names that may be shown


def show_fields(names: Iterable[str]) -> None:
    """Allow errors to show the names of these fields."""
    FIELDS.update(names)


def _invalid(errors: Iterable[Mapping[str, Any]]) -> APIError:
    """What is wrong with a body. Only names of our own fields, and numbers of items, are shown."""
    several = list(errors)
    found: Mapping[str, Any] = several[0] if several else {}
    if found.get("type") == "json_invalid":
        return bad_request("The body is not valid JSON.")
    place: list[str] = []
    for part in tuple(found.get("loc", ()))[1:]:
        if isinstance(part, int) and place:
            place.append(f"[{part}]")
        elif place and place[-1] == f".{part}":
            continue  # what a type is chosen by stands before its field of the same name
        elif part in FIELDS:
            place.append(f".{part}" if place else str(part))
        else:
            break
    param = "".join(place) or None
    depth = len(place) + 1
    same = [each for each in several if each.get("loc", ())[:depth] == found.get("loc", ())[:depth]]
    if len(same) > 1:  # it fits none of several types
        return bad_request(f"{param or 'The body'} has a wrong type or value.", param, WRONG)
    reason = _REASONS.get(str(found.get("type", "")), "has a wrong type or value")
    limits = {k: v for k, v in found.get("ctx", {}).items() if k in _LIMITS}
    for name, value in limits.items():
        if isinstance(value, int | float):
            reason = f"must be {_LIMITS[name]} {value:g}"
    return bad_request(f"{param or 'The body'} {reason}.", param, WRONG)


_LIMITS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "min_length": "of a length of at least",
    "max_length": "of a length of at most",
}
_REASONS = {
    "missing": "is missing",
    "extra_forbidden": "has a key that this server does not know",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode text",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_attributes_type": "must be a JSON object, sent as application/json",
    "model_type": "must be a JSON object",
}
