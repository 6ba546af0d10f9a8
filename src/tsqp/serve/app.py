"""The FastAPI app."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from tsqp import __version__
from tsqp.api.base import RequestBody
from tsqp.serve import (
    chat,
    completions,
    errors,
    page_files,
    receipts,
    responses,
    tokens,
    view,
    well_known,
)
from tsqp.serve.middleware import Gate
from tsqp.serve.state import State


def make_app(state: State) -> FastAPI:
    """The app of one server."""
    app = FastAPI(
        title="TSQP",
        version=__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.tsqp = state
    errors.install(app)
    errors.show_fields(_names(RequestBody))
    for module in (
        chat,
        completions,
        responses,
        tokens,
        view,
        page_files,
        well_known,
        receipts,
    ):
        app.include_router(module.router)
    if state.receipts is not None:
        app.add_middleware(receipts.Receipts, book=state.receipts)
    app.add_middleware(Gate, options=state.options)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _names(kind: type[BaseModel]) -> Iterator[str]:
    """The names of the fields of all requests."""
    for each in kind.__subclasses__():
        for name, field in each.model_fields.items():
            yield field.alias or name
        yield from _names(each)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the status 422, which this server never answers."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
