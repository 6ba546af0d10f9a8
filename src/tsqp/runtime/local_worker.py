"""A worker as a child process: the endpoint `local`.

It runs on the same machine, as the same user and in the same trust domain as this process. It is
meant for trying things out.
"""

import os
import secrets
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import ClassVar

from tsqp.errors import WorkerUnavailable
from tsqp.gpu.ready import READY

STOP_S = 5.0

# The only environment variables that the child inherits. Others may hold prompts, keys and tokens.
# PYTHONPATH is included, so that the child imports the same tsqp. Other variables that make Python
# or the dynamic linker run code are not.
_INHERITED = {
    "HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONNOUSERSITE", "PYTHONPATH", "TMPDIR",
    "TSQP_CACHE", "TZ", "VIRTUAL_ENV", "XDG_CACHE_HOME",
}  # fmt: skip
_INHERITED_PREFIXES = ("CUDA_", "KMP_", "LC_", "MKL_", "NVIDIA_", "OMP_")


class LocalWorker:
    """Starts `tsqp worker` and stops it again.

    The child stops when its standard input ends, so it cannot outlive this process, however this
    process ends. Only this process controls it; a forked process cannot.

    Attributes:
        PROGRAM: what Python runs. A benchmark has another one.
        endpoint: where it listens. If the system chooses the port, it is known once it is ready.
    """

    PROGRAM: ClassVar[tuple[str, ...]] = ("-m", "tsqp", "worker")

    def __init__(self, arguments: Sequence[str], listen: str | None = None) -> None:
        """Start a worker. It loads its weights while this process loads its own.

        Args:
            arguments: the model and options for `tsqp worker`, without --listen.
            listen: None for a name in Linux's abstract namespace, which leaves no file behind.
        """
        self._is_ready = False
        self.endpoint = listen or f"ipc://@tsqp-{secrets.token_hex(16)}"
        # -P: the current folder, which may be a downloaded model's, is not a place to import from.
        command = [sys.executable, "-P", *self.PROGRAM, *arguments]
        self._process = subprocess.Popen(
            [*command, "--listen", self.endpoint, "--supervised"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=inherited(os.environ),
            start_new_session=True,  # Ctrl-C is for this process, which then stops the child
        )
        self._pid = os.getpid()
        _workers.add(self)
        self._last_words: deque[str] = deque(maxlen=20)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        """Stop the worker; safe to call twice, and from any thread."""
        if self._pid != os.getpid():
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._listener is not threading.current_thread():
            self._listener.join(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def await_ready(self) -> None:
        """Wait until the worker serves; does nothing the second time.

        Raises:
            WorkerUnavailable: the worker ended. The message has the last line of its output.
        """
        if self._is_ready:
            return
        assert self._process.stdout is not None
        for line in self._process.stdout:
            ready, _, endpoint = line.strip().partition(" ")
            if ready == READY:
                self.endpoint, self._is_ready = endpoint, True
                return
        raise WorkerUnavailable(f"The local worker {self.wait()}")

    def wait(self) -> str:
        """Wait until the worker ends; returns its exit status and the last line of its output."""
        status = self._process.wait()
        self._listener.join(STOP_S)
        reason = self._last_words[-1] if self._last_words else "it said nothing"
        return f"ended with exit status {status}: {reason.removeprefix('error: ')}"

    def _listen(self) -> None:
        """Read the child's output, so that its pipe does not fill up, and keep the last lines."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                if line.strip():
                    self._last_words.append(line.strip())


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a local worker needs: places, locale and devices."""
    return {
        name: value
        for name, value in environment.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }


_workers: weakref.WeakSet[LocalWorker] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Close the worker's standard input in a forked child: the worker must stop with its parent."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for worker in list(_workers):
        pipe = worker._process.stdin
        if pipe is not None and not pipe.closed:
            os.dup2(nothing, pipe.fileno(), inheritable=False)  # the number stays in use
    os.close(nothing)


os.register_at_fork(after_in_child=_let_go_in_child)
