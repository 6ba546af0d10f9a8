"""A server in a thread of the tests, whose model and deadlines they can change."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from serve_client import DEADLINE_S, Server

from tsqp import AsyncLLM
from tsqp.runtime.admission import Admission
from tsqp.serve.app import make_app
from tsqp.serve.connections import REFUSAL, Listener
from tsqp.serve.metrics import Metrics
from tsqp.serve.options import ServeOptions
from tsqp.serve.run import http_server
from tsqp.serve.state import State


@contextmanager
def serving(
    options: ServeOptions, llm: AsyncLLM | None = None, *, app: Any = None, texts: int = 64
) -> Iterator[Server]:
    """Serve a model, or an app instead of ours."""
    metrics = Metrics("tiny", lambda: llm)
    state = State(options, ("tiny",), metrics, Admission(0, texts), llm=llm)
    made = http_server(make_app(state) if app is None else app, replace(options, port=0))
    refusal = b"" if options.ssl_certfile else REFUSAL
    listener = Listener(socket.create_server(("127.0.0.1", 0)), options.most_connections, refusal)
    port = listener.getsockname()[1]

    async def serve() -> None:
        await made.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="http")
    thread.start()
    try:
        yield Server(port)
    finally:
        made.should_exit = made.force_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
