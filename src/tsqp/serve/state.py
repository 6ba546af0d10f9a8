"""What all endpoints share."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from tsqp.runtime.admission import Admission
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.attestation import Attestation
from tsqp.serve.errors import APIError, bad_request, unavailable
from tsqp.serve.metrics import Metrics
from tsqp.serve.options import ServeOptions
from tsqp.serve.receipts import ReceiptBook
from tsqp.serve.tools import ToolStyle, tool_style
from tsqp.tee.worker_view import WorkerView

LOADING = "loading"
MAX_TEXTS = 64  # requests that only tokenize or detokenize, at a time


@dataclass(slots=True)
class State:
    """The server, while it loads and after it.

    Attributes:
        names: under which it is served; answers have the first one.
        texts: lets in requests that only tokenize or detokenize.
        worker_view: samples what workers receive; None unless the options ask for it.
        attestation: of this process; None unless the options ask for it.
        receipts: those of the last minutes; None unless the options ask for them.
        llm: the model, once it is loaded.
    """

    options: ServeOptions
    names: tuple[str, ...]
    metrics: Metrics
    texts: Admission
    worker_view: WorkerView | None = None
    attestation: Attestation | None = None
    receipts: ReceiptBook | None = None
    llm: AsyncLLM | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def status(self) -> str:
        """See `AsyncLLM.status`; "loading" before there is one."""
        return LOADING if self.llm is None else self.llm.status

    @property
    def quarantined(self) -> int:
        """Number of workers that are never asked again."""
        workers = [] if self.llm is None else self.llm.workers
        return sum(each.state == "quarantined" for each in workers)

    def ready(self) -> AsyncLLM:
        """The model, once it is loaded.

        Raises:
            APIError: it is not.
        """
        if self.llm is None:
            raise unavailable("The model is still being loaded.", "loading")
        return self.llm

    def ready_for_text(self) -> AsyncLLM:
        """The same, if it has a tokenizer.

        Raises:
            APIError: it is not loaded, or has none.
        """
        llm = self.ready()
        if not llm.has_tokenizer:
            raise bad_request("This model has no tokenizer: send token ids to /v1/completions.")
        return llm

    def tool_style(self) -> ToolStyle | None:
        """How the model writes tool calls; None if that is not known."""
        return tool_style(self.ready().chat_template, self.options.tool_call_parser)

    def check_model(self, name: str | None) -> str:
        """The name of the model in the answer to a request that names this one, or none.

        Raises:
            APIError: another one is wanted.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise APIError(
                404,
                f"This server serves no model of this name: use {self.names[0]}.",
                param="model",
                code="model_not_found",
            )
        return name


def state_of(request: Request) -> State:
    """The state of the app that a request came to."""
    state = request.app.state.tsqp
    assert isinstance(state, State)
    return state
