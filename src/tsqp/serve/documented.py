"""Which answers there may be besides 200, for the OpenAPI document."""

from typing import Any

from tsqp.api.base import ErrorAnswer

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        500: "The server failed.",
        503: "The server is loading, full, shutting down, or its worker has failed.",
    }.items()
}
# FastAPI documents 422 unless it is named; this server answers 400 instead.
STREAM_OR_JSON: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {
        "description": "The answer, or with stream its pieces as server-sent events.",
        "content": {"text/event-stream": {}},
    },
}
