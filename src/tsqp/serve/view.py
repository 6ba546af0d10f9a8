"""`/v1/tsqp/view/{request_id}`: what a worker received for a request, if the options allow it."""

from base64 import b64encode

from fastapi import APIRouter, Request, Response

from tsqp.api.tokens import ViewAnswer
from tsqp.serve.documented import ERRORS
from tsqp.serve.errors import APIError
from tsqp.serve.state import state_of

router = APIRouter()


@router.get("/v1/tsqp/view/{request_id}", response_model=ViewAnswer, responses=ERRORS)
async def view(request_id: str, request: Request, response: Response) -> ViewAnswer:
    """A sample of what the worker received for a request of the last minute, of the same key."""
    state = state_of(request)
    state.ready()
    worker_view = state.worker_view
    if worker_view is None or worker_view.group is None:
        raise _absent("This server does not show what workers receive.")
    sample = worker_view.sample(request.state.tenant, request_id)
    if sample is None:  # the same answer for a request of another key
        raise _absent("There is nothing to show of this request, or not any more.")
    rows, columns = sample.masked_RC.shape
    assert sample.group.layer is not None
    response.headers["Cache-Control"] = "no-store"
    return ViewAnswer(
        layer=sample.group.layer,
        group=sample.group.name,
        rows=rows,
        columns=columns,
        masked=b64encode(sample.masked_RC.tobytes()).decode(),
        plain=b64encode(sample.plain_RC.tobytes()).decode(),
    )


def _absent(message: str) -> APIError:
    return APIError(404, message, code="no_view")
