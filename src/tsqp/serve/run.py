"""Listens, loads, serves, and drains."""

import asyncio
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from tsqp import __version__
from tsqp.api.evidence import configuration_digest
from tsqp.api.listening import keep_quiet, listen
from tsqp.errors import UsageError, WorkerUnavailable
from tsqp.runtime.admission import Admission
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.runtime.options import Options
from tsqp.serve.app import make_app
from tsqp.serve.attestation import Attestation, begin_attestation
from tsqp.serve.connections import REFUSAL, Connection, Listener
from tsqp.serve.metrics import Metrics
from tsqp.serve.options import ServeOptions
from tsqp.serve.receipts import ReceiptBook
from tsqp.serve.secrets import fetch_secrets
from tsqp.serve.state import MAX_TEXTS, State
from tsqp.tee.worker_view import WorkerView
from tsqp.wire.socket_file import remove_stale

log = logging.getLogger("tsqp")

BACKLOG = 2048
LOOK_S = 0.1
LAST_S = 10  # for the last bytes of requests that were ended


def run_server(
    model: str,
    options: Options,
    served: ServeOptions,
    on_load: Callable[[int, int], None] | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM, then let the running requests end.

    The server listens while the model is being loaded; `/health` is 503 then.

    Args:
        model: as for `LLM`.
        on_load: called while weights are read, with the bytes read and their total.

    Raises:
        UsageError: the address cannot be used, or the certificate.
        AttestationError: the platform gives no evidence, or a key broker no secret, and the options
            ask for it.
        TSQPError: the model cannot be loaded, or there is no worker.
    """
    secrets = fetch_secrets(options, served)
    options = replace(options, model_key=secrets.model_key) if secrets.model_key else options
    served = replace(served, api_keys=(*served.api_keys, *secrets.api_keys))
    attestation = begin_attestation(options, served)
    server = _Server(model, options, served, on_load, attestation)
    if served.exposure:
        log.warning("%s", served.exposure)
    if served.show_worker_view:
        log.warning(
            "--show-worker-view keeps a sample of the activations of recent requests, and shows "
            "it to whoever %s.",
            "holds the API key of the request" if served.api_keys else "knows the request's id",
        )
    with _listening(served) as listener:
        asyncio.run(server.run(listener))


class _Stopped(Exception):
    """Raised within loading, to end it after a signal."""


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals to us, and that ends the handshakes of slow clients."""

    def __init__(self, config: uvicorn.Config, options: ServeOptions) -> None:
        super().__init__(config)
        self._options = options

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise them again at its end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        make = partial(
            Connection,
            self._options,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        handshake = None if self.config.ssl is None else self._options.header_timeout
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                make,
                sock=each,
                ssl=self.config.ssl,
                backlog=BACKLOG,
                ssl_handshake_timeout=handshake,
            )
            for each in sockets
        ]
        self.started = True


def http_server(
    app: FastAPI, served: ServeOptions, context: ssl.SSLContext | None = None
) -> _Uvicorn:
    """The server of an app; `serve` of it needs a `Listener`.

    Args:
        context: for TLS with a key that is in no file.

    Raises:
        UsageError: the certificate cannot be used.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        proxy_headers=False,
        root_path=served.root_path,
        ssl_certfile=served.ssl_certfile,
        ssl_keyfile=served.ssl_keyfile,
        timeout_graceful_shutdown=LAST_S,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"The certificate cannot be used ({type(error).__name__}): check --ssl-certfile "
            "and --ssl-keyfile."
        ) from None
    config.ssl = config.ssl if context is None else context
    return _Uvicorn(config, served)


class _Server:
    def __init__(
        self,
        model: str,
        options: Options,
        served: ServeOptions,
        on_load: Callable[[int, int], None] | None,
        attestation: Attestation | None,
    ) -> None:
        names = tuple(served.served_model_names) or (model,)
        self._model = model
        self._options = options
        self._served = served
        self._on_load = on_load
        view = WorkerView() if served.show_worker_view else None
        texts = Admission(0, MAX_TEXTS, is_shared=served.is_shared)
        metrics = Metrics(names[0], self._get_llm)
        self._attestation = attestation
        book = ReceiptBook(attestation) if attestation and served.receipts else None
        self._state = State(served, names, metrics, texts, view, attestation, book)
        self._signals = 0
        keep_quiet("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")
        context = None if attestation is None else attestation.context
        self._uvicorn = http_server(make_app(self._state), served, context)

    def _get_llm(self) -> AsyncLLM | None:
        return self._state.llm

    async def run(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_type_only)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        try:
            log.info("listening at %s; loading %s …", _address(self._served, listener), self._model)
            await self._load()
            if self._state.llm is not None:
                async with self._attested(self._state.llm):
                    self._say_ready(self._state.llm, _address(self._served, listener))
                    while not self._signals and not serving.done():
                        await asyncio.sleep(LOOK_S)
                    await self._drain(self._state.llm)
        finally:
            self._uvicorn.should_exit = True
            try:
                if self._state.llm is not None:
                    await asyncio.to_thread(self._state.llm.close)
            finally:
                await serving

    async def _load(self) -> None:
        with suppress(_Stopped):
            self._state.llm = await asyncio.to_thread(
                AsyncLLM,
                self._model,
                self._options,
                on_load=self._heed,
                max_model_len=self._served.max_model_len,
                max_num_seqs=self._served.max_num_seqs,
                max_num_queued_reqs=self._served.max_num_queued_reqs,
                share_queue=self._served.is_shared,
                observer=self._state.metrics,
                worker_view=self._state.worker_view,
            )

    @asynccontextmanager
    async def _attested(self, llm: AsyncLLM) -> AsyncIterator[None]:
        """Present evidence of the loaded model, and renew it meanwhile."""
        if self._attestation is None:
            yield
            return
        await self._attestation.begin(
            model_digest=llm.model_digest,
            privacy=llm.privacy,
            field=llm.field,
            version=__version__,
        )
        renewing = asyncio.create_task(self._attestation.keep_renewed())
        try:
            yield
        finally:
            renewing.cancel()
            self._attestation.close()

    def _say_ready(self, llm: AsyncLLM, address: str) -> None:
        log.info(
            "serving %s at %s: privacy %s, transport %s, model %s",
            self._state.names[0], address, llm.privacy, llm.transport, llm.model_digest,
        )  # fmt: skip
        if self._attestation is not None:
            digest = configuration_digest(self._attestation.configuration).hex()
            log.info("attested by %s: configuration sha256:%s", self._attestation.platform, digest)
        if llm.pads is not None:
            log.info("masks in stock: %d bytes; more are being made", llm.pads.stock_bytes)

    async def _drain(self, llm: AsyncLLM) -> None:
        log.info("ending: %d answers get up to %g seconds",
                 llm.num_running + llm.num_waiting, self._served.shutdown_timeout)  # fmt: skip
        draining = asyncio.create_task(llm.drain(self._served.shutdown_timeout))
        while not draining.done() and self._signals < 2:
            await asyncio.sleep(LOOK_S)
        draining.cancel()

    def _on_signal(self) -> None:
        self._signals += 1

    def _heed(self, done: int, total: int) -> None:
        if self._signals:
            raise _Stopped
        if self._on_load is not None:
            self._on_load(done, total)


@contextmanager
def _listening(served: ServeOptions) -> Iterator[socket.socket]:
    """The socket to listen on; a Unix socket is removed at the end, and only its owner may use it.

    Raises:
        UsageError: the address cannot be used.
    """
    refusal = b"" if served.has_tls else REFUSAL
    if served.uds is None:
        listener = listen(served.host, served.port, BACKLOG)
        with closing(Listener(listener, served.most_connections, refusal)) as listening:
            yield listening
        return
    if served.uds.is_socket():  # perhaps of a server that was killed
        with suppress(WorkerUnavailable):  # somebody listens there: `bind` says so
            remove_stale(served.uds)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(served.uds))
    except OSError as error:
        listener.close()
        raise UsageError(f"Cannot listen on --uds: {error.strerror}.") from None
    finally:
        os.umask(mask)
    try:
        listener.listen(BACKLOG)
        with closing(Listener(listener, served.most_connections, refusal)) as listening:
            yield listening
    finally:
        listener.close()
        served.uds.unlink(missing_ok=True)


def _address(served: ServeOptions, listener: socket.socket) -> str:
    if served.uds is not None:
        return f"unix:{served.uds}"
    scheme = "https" if served.has_tls else "http"
    host = f"[{served.host}]" if ":" in served.host else served.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _log_type_only(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("an unexpected %s in the event loop", type(error).__name__)
