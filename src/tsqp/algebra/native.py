"""How loops over whole arrays become machine code: numba, compiled once, when a loop is needed.

Compiling takes tenths of a second a loop, so modes that do not use one do not wait for it, and
those that do call `Kernel.compile` while they load. No cache on disk, which would be unpickled
code; no parallel loops, two of which at once abort the process: callers split rows over a thread
pool, for which every kernel releases the interpreter.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

# What nobody calls from C, or from Python, needs no wrapper for it: each costs time to compile.
_KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_INLINED = _KERNEL | {"no_cpython_wrapper": True, "forceinline": True}
_REORDERED = _INLINED | {"fastmath": {"reassoc"}}


class Kernel:
    """A compiled function for one signature; other arguments are refused.

    The first call compiles it, if nobody has yet. Safe to use from several threads.
    """

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self._dispatcher = numba.njit(**_KERNEL)(function)
        self._signature = signature
        self._lock = threading.Lock()
        self._run: Callable[..., Any] = self._compile_and_run

    def __call__(self, *arguments: object) -> Any:
        return self._run(*arguments)

    def compile(self) -> None:
        """Compile it now; does nothing the second time."""
        with self._lock:
            if self._run is not self._dispatcher:
                self._dispatcher.compile(self._signature)
                self._dispatcher.disable_compile()
                self._run = self._dispatcher

    def _compile_and_run(self, *arguments: object) -> Any:
        self.compile()
        return self._run(*arguments)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a kernel."""
    return lambda function: Kernel(function, signature)


def inlined(function: F) -> F:
    """Compile a function into the kernels that call it."""
    return cast(F, numba.njit(**_INLINED)(function))


def reordered(function: F) -> F:
    """Like `inlined`; sums may be added up in any order, which changes their rounding."""
    return cast(F, numba.njit(**_REORDERED)(function))
