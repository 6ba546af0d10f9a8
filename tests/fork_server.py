"""A process that imports everything once, and forks for each program that `processes` starts."""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import termios
import threading
import weakref
from pathlib import Path
from typing import Any, NoReturn

# Most make a console of the environment that they find when they are imported.
NOT_PRELOADED = (
    "tsqp.cli.console", "tsqp.cli.printing", "tsqp.cli.repl", "tsqp.cli.demo_run",
    "tsqp.cli.local_chat", "tsqp.cli.remote_chat",
    "tsqp.gpu.backends.triton_product",  # Triton complains at the end of each fork
)  # fmt: skip
PROGRAMS = ("tsqp.__main__", "tsqp.bench.serve_replay", "tsqp.bench.start_once")
# What commands import late.
PRELOADED = ("gguf", "rich._emoji_codes", "rich.progress", "transformers", "typer._adapters",
             "typer.rich_utils", "zmq")  # fmt: skip
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
LONGEST_REQUEST = 2**17  # bytes, with the whole environment

requests: socket.socket | None = None  # in a fork: where it asks for forks of its own


def main(control: int, requests: int) -> None:
    """Serve; in a fork, run its program."""
    preload()
    fork = serve(socket.socket(fileno=control), socket.socket(fileno=requests))
    if fork is not None:
        become(*fork)


def preload() -> None:
    """Import what commands import, and compile their kernels, without starting a thread."""
    import tsqp

    for name in PRELOADED:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(tsqp.__path__, "tsqp."):
        if module.name not in NOT_PRELOADED + PROGRAMS:
            importlib.import_module(module.name)
    assert not sys.modules.keys() & set(NOT_PRELOADED), "one of them was imported by another module"

    from processes import fork_local_workers
    from tsqp.algebra.native import Kernel

    for kernel in [each for each in gc.get_objects() if type(each) is Kernel]:
        kernel.compile()
    fork_local_workers()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch's libraries take themselves apart
    gc.collect()
    LIBC.malloc_trim(0)  # so that a fork that needs memory grows by it
    gc.freeze()  # what is there now stays: no fork need look at it, and so copy it
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads are not forked"


def serve(
    control: socket.socket, requests_end: socket.socket
) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each request, and tell who asked how the fork ended, until standard input ends.

    Returns:
        In a fork: what it is to run, and what its standard streams are to be.
    """
    global requests
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd: process id, and who asked
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(control, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        for pidfd in ready & running.keys():
            pid, asked = running.pop(pidfd)
            selector.unregister(pidfd)
            os.close(pidfd)
            _tell(asked, os.waitpid(pid, 0)[1])
            asked.close()
        if 0 in ready:
            return None
        if control.fileno() not in ready:
            continue
        request, descriptors, _, _ = socket.recv_fds(control, LONGEST_REQUEST, 5)
        asks = socket.socket(fileno=descriptors.pop(0))
        pid = os.fork()
        if not pid:
            requests = requests_end
            selector.close()
            for each in (control, asks, *(asked for _, asked in running.values())):
                each.close()
            for pidfd in running:
                os.close(pidfd)
            return json.loads(request), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        running[pidfd] = pid, asks
        selector.register(pidfd, selectors.EVENT_READ)
        _tell(asks, pid)


def _tell(asked: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # who asked may have ended
        asked.sendall(number.to_bytes(8, "little"))


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Run a program as a new interpreter would."""
    _inherit(request["limits"], descriptors.pop(0))
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["name"]:
        Path("/proc/self/comm").write_text(request["name"])
    if request["mounts"]:
        _mount(request["mounts"])
    if os.environ.pop("TESTS_GIVE_UP_SOON", ""):
        _give_up_soon()
    for number in request["closed"]:
        os.close(number)
    _renew_streams()
    _end(_status_of(request["arguments"]))


def _give_up_soon() -> None:
    """Look for a worker that was lost for half a second; the first connection takes its time."""
    from tsqp.errors import TSQPError
    from tsqp.runtime.worker_sessions import WorkerSessions
    from tsqp.wire import client

    end = WorkerSessions.end

    def soon(sessions: WorkerSessions, error: TSQPError) -> None:
        client.CONNECT_S = 0.5
        end(sessions, error)

    WorkerSessions.end = soon  # type: ignore[method-assign]


def _inherit(limits: dict[str, tuple[int, int]], namespace: int) -> None:
    """Take what a process gives to its children, where the server may have something else.

    Args:
        namespace: a descriptor of that of its mounts.
    """
    for limit, values in limits.items():
        resource.setrlimit(int(limit), values)
    if not os.path.sameopenfile(namespace, (own := os.open("/proc/self/ns/mnt", os.O_RDONLY))):
        _check(LIBC.setns(namespace, CLONE_NEWNS))
    os.close(own)
    os.close(namespace)


def _mount(script: str) -> None:
    """Do what `unshare --mount sh -c SCRIPT` does, but go on."""
    everywhere = b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None
    _check(LIBC.unshare(CLONE_NEWNS))
    _check(LIBC.mount(*everywhere))
    subprocess.run(["sh", "-c", script, "sh", "true"], check=True)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _renew_streams() -> None:
    """Make the objects for the standard streams as an interpreter does when it starts."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        old = getattr(sys, name)
        try:
            new = open(  # noqa: SIM115
                number, mode, encoding=old.encoding, errors=old.errors, closefd=False
            )
        except OSError:  # it is closed
            new = None
        if number and new is not None:
            at_once = number == 2 or new.isatty()
            new.reconfigure(line_buffering=at_once, write_through=old.write_through)
        for each in (name, f"__{name}__"):
            setattr(sys, each, new)


def _run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does."""
    is_safe = arguments[0] == "-P"
    kind, *rest = arguments[is_safe:]
    sys.path.pop()  # the folder of this file
    first = {"-m": str(Path.cwd()), "-c": ""}.get(kind, str(Path(kind).parent))
    sys.path[:0] = [] if is_safe else [first]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def _status_of(arguments: list[str]) -> int:
    """Run a program until it ends; gives its exit status, or minus the signal that is to end it."""
    try:
        _run(arguments)
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return (exit_.code or 0) & 0xFF
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(status: int) -> NoReturn:
    """End as an interpreter does, but without taking apart what was there before the fork.

    That would copy most of the server's memory. Threads, exit functions and the names of the
    program end as always; the modules that it imported are left as they are.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
