"""Keeps one `tsqp worker` process running."""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from tsqp.errors import WorkerUnavailable
from tsqp.runtime.local_worker import LocalWorker

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
LONG_RUN_S = 30.0  # a worker that served so long is started again without a pause


class State(NamedTuple):
    """A worker's state.

    Attributes:
        endpoint: where it serves; None while it starts.
        restarts: how often it was started again.
        error: why it ended the last time; empty if it never did.
    """

    endpoint: str | None = None
    restarts: int = 0
    error: str = ""


class Supervisor:
    """Starts a worker, and starts it again whenever it ends.

    A worker that ends soon after its start is started again after a pause, which doubles each time.
    """

    def __init__(self, arguments: Sequence[str], listen: str) -> None:
        """Start the worker.

        Args:
            arguments: the model and options for `tsqp worker`, without --listen.
            listen: the endpoint. With port 0 each start has another port.
        """
        self._arguments = arguments
        self._listen = listen
        self._state = State()
        self._stop = threading.Event()
        self._starting = threading.Lock()
        self._worker: LocalWorker | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def state(self) -> State:
        """The worker's state now."""
        return self._state

    def close(self) -> None:
        """Stop the worker; safe to call twice."""
        self._stop.set()
        with self._starting:
            worker = self._worker
        if worker is not None:
            worker.close()
        self._thread.join()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while (worker := self._start()) is not None:
            began = time.monotonic()
            try:
                worker.await_ready()
                self._state = self._state._replace(endpoint=worker.endpoint)
                error = f"The worker {worker.wait()}"
            except WorkerUnavailable as exc:
                error = str(exc)
            except ValueError:  # its output was closed by `close`
                return
            finally:
                worker.close()
            self._state = State(None, self._state.restarts + 1, error)
            if time.monotonic() - began > LONG_RUN_S:
                pause_s = FIRST_PAUSE_S
                continue
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _start(self) -> LocalWorker | None:
        with self._starting:
            if self._stop.is_set():
                return None
            self._worker = LocalWorker(self._arguments, self._listen)
            return self._worker
