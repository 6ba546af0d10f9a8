"""Starts programs of this Python: as forks of a server that has imported everything already.

Starting Python with torch takes two seconds, and the tests start hundreds of processes. A fork is a
process of its own, with its own pipes, environment, working folder and session; only its imports
are done. Where that makes a difference, a test is marked `fresh`: its processes start from nothing.
"""

import atexit
import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

import fork_server
import tsqp  # noqa: F401  before torch: it tells OpenMP not to spin, in the environment below

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
CLOSED = -4  # a standard stream that a shell closes, as by 2>&-; forks only
Stream = int | IO[Any] | None
Command = Sequence[str]
TAG = "LC_TESTS_TAG"  # whose a process is; local workers inherit LC_*

# Read when an interpreter starts, or when torch loads: a fork comes too late for them.
READ_ONCE = ("PYTHON", "OMP_", "GOMP_", "MKL_", "NUMBA_", "LANG", "LC_", "LD_")
# Of these, what no program of ours can tell; local workers do not inherit it.
NO_MATTER = (TAG, "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
WITH_MOUNTS = ("unshare", "--mount", "sh", "-c")
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.argv[1], sys.argv[1:])"
)

_born_with = dict(os.environ)
_forks = True


@contextlib.contextmanager
def from_nothing() -> Iterator[None]:
    """Every process that is started here is a new interpreter."""
    global _forks
    before, _forks = _forks, False
    try:
        yield
    finally:
        _forks = before


def fork_name(tag: str) -> str:
    """The name of a fork with this tag: its `/proc/PID/environ` is that of the server."""
    return f"t{hashlib.sha256(tag.encode()).hexdigest()[:12]}"


def may_fork(command: Command, env: Mapping[str, str]) -> bool:
    """Whether this Python is to run this, with variables that mean the same in a fork."""
    once = [
        {
            name: value
            for name, value in each.items()
            if name.startswith(READ_ONCE) and name not in NO_MATTER
        }
        for each in (env, _born_with)
    ]
    return _forks and command[0] == sys.executable and once[0] == once[1]


def start(
    command: Command,
    *,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    terminal: bool = False,
    mounts: str = "",
    text: bool = True,
) -> "Process":
    """Start a process; the arguments are those of subprocess.Popen.

    Args:
        terminal: make standard input the terminal of the new session.
        mounts: a shell script that changes what is mounted, for this process and its children; it
            ends in `exec "$@"`.
    """
    assert text
    env = dict(os.environ if env is None else env)
    if may_fork(command, env):
        request = {
            "arguments": list(command[1:]),
            "limits": {limit: resource.getrlimit(limit) for limit in LIMITS},
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": env,
            "session": start_new_session,
            "terminal": terminal,
            "mounts": mounts,
            "closed": [n for n, each in enumerate((stdin, stdout, stderr)) if each == CLOSED],
            "name": fork_name(env[TAG]) if TAG in env else "",
        }
        return Fork(command, request, stdin, stdout, stderr)
    assert CLOSED not in (stdin, stdout, stderr)
    if terminal:
        command = [sys.executable, "-c", TAKE_TERMINAL, *command]
    if mounts:
        command = [*WITH_MOUNTS, mounts, "sh", *command]
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=env,
        text=True,
        start_new_session=start_new_session,
    )


def fork_local_workers() -> types.ModuleType:
    """Let `local` workers start as forks; returns what started them before."""
    from tsqp.runtime import local_worker

    before = local_worker.subprocess
    local_worker.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
        Popen=start, PIPE=PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    return before


class Fork:
    """A process of the server, with what the tests and the product use of subprocess.Popen."""

    def __init__(
        self, command: Command, request: object, stdin: Stream, stdout: Stream, stderr: Stream
    ) -> None:
        self.args = command
        self.returncode: int | None = None
        self._lock = threading.Lock()
        with contextlib.ExitStack() as theirs:
            self.stdin, in_ = _stream(stdin, 0, theirs)
            self.stdout, out = _stream(stdout, 1, theirs)
            self.stderr, err = _stream(stderr, 2, theirs)
            self._status, reply = socket.socketpair()
            theirs.callback(reply.close)
            requests = fork_server.requests or server().requests
            namespace = theirs.enter_context(Path("/proc/self/ns/mnt").open())
            descriptors = [reply.fileno(), namespace.fileno(), in_, out, err]
            socket.send_fds(requests, [json.dumps(request).encode()], descriptors)
        self.pid = self._receive(None)

    def _receive(self, timeout: float | None) -> int:
        """The next number from the server: the process id first, then how the process ended."""
        self._status.settimeout(timeout)
        received = self._status.recv(8, socket.MSG_WAITALL)
        if len(received) != 8:
            raise RuntimeError("The fork server has ended.")
        return int.from_bytes(received, "little")

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self._lock:
            if self.returncode is None:
                try:
                    status = self._receive(timeout)
                except (TimeoutError, BlockingIOError):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
                self._status.close()
                self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


Process = Fork | subprocess.Popen[str]


def _stream(
    wanted: Stream, number: int, theirs: contextlib.ExitStack
) -> tuple[IO[str] | None, int]:
    """Our end of a pipe, if there is to be one, and the descriptor for the other process."""
    if wanted == PIPE:
        ours, other = os.pipe() if number else os.pipe()[::-1]
        theirs.callback(os.close, other)
        return open(ours, "r" if number else "w", encoding="utf-8"), other  # noqa: PTH123
    if wanted in (DEVNULL, CLOSED):
        return None, theirs.enter_context(Path(os.devnull).open("r+b")).fileno()
    if wanted is None:
        return None, number
    return None, wanted if isinstance(wanted, int) else wanted.fileno()


class Server:
    """The process that forks; it ends with this one, whose standard input it reads."""

    def __init__(self) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = [theirs.fileno(), self.requests.fileno()]
        program = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import fork_server"
        program += "; fork_server.main(*map(int, sys.argv[1:]))"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, *map(str, descriptors)],
            stdin=PIPE,
            pass_fds=descriptors,
            env=_born_with | {"OPENBLAS_NUM_THREADS": "1"},  # or NumPy starts threads
            start_new_session=True,  # Ctrl-C is for the tests, which then end what they started
        )
        theirs.close()
        self.pid = self._process.pid

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self.requests.close()


@cache
def server() -> Server:
    """The one of this process; it starts when it is first needed."""
    started = Server()
    atexit.register(started.close)
    return started
