"""Compiles loops over whole arrays to machine code with numba, once, when a loop is needed.

Compiling takes tenths of a second per loop, and so does importing numba. Modes without such loops
do not wait for this, and the other modes call `Kernel.compile` while they load. There is no cache
on disk, because it would be unpickled code. There are no parallel loops, because two of them at
once abort the process. Instead callers divide rows over a thread pool, for which every kernel
releases the interpreter.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

from tsqp.algebra.compiler import numba

F = TypeVar("F", bound=Callable[..., Any])

# What nobody calls from C, or from Python, needs no wrapper for it: each costs time to compile.
_KERNEL: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_INLINED = _KERNEL | {"no_cpython_wrapper": True, "forceinline": True}
_REORDERED = _INLINED | {"fastmath": {"reassoc"}}

_COMPILING = threading.Lock()  # numba has one for all threads, too


class Kernel:
    """A compiled function for one signature; other arguments are refused.

    The first call compiles it, if nobody has yet. Safe to use from several threads.
    """

    def __init__(self, function: Callable[..., Any], signature: str, *, nogil: bool = True) -> None:
        self.name = f"{function.__module__}.{function.__name__}: {signature}"
        self._function = function
        self._signature = signature
        self._options = _KERNEL | {"nogil": nogil}
        self._compiled = False
        self._run: Callable[..., Any] = self._compile_and_run

    def __call__(self, *arguments: object) -> Any:
        return self._run(*arguments)

    def compile(self) -> None:
        """Compile it now; does nothing the second time."""
        with _COMPILING:
            if not self._compiled:
                dispatcher = numba().njit(**self._options)(self._function)
                dispatcher.compile(self._signature)
                dispatcher.disable_compile()
                self._run = dispatcher
                self._compiled = True

    @property
    def function(self) -> Callable[..., Any]:
        """The compiled function, whose call takes 0.3 µs less than one of this object."""
        self.compile()
        return self._run

    def _compile_and_run(self, *arguments: object) -> Any:
        self.compile()
        return self._run(*arguments)


class Inlined:
    """A function that is compiled into the kernels that call it, and cannot be called otherwise."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._function = function
        self._options = options

    @cached_property
    def _dispatcher(self) -> Any:
        return numba().njit(**self._options)(self._function)

    @property
    def _numba_type_(self) -> Any:
        """Read by numba when it compiles a kernel that uses this object."""
        return self._dispatcher._numba_type_


class Instruction:
    """An LLVM instruction in a kernel that numba has no function for, or none that is vectorised.

    Args:
        signature: numba's, as "float64(float64)".
        build: makes the instruction from an LLVM builder and the values of the arguments.
    """

    def __init__(self, signature: str, build: Callable[[Any, Sequence[Any]], Any]) -> None:
        self._signature = signature
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("An instruction is for kernels only.")

    @cached_property
    def _numba_type_(self) -> Any:
        """As in `Inlined`."""
        types, result = numba().core.sigutils.normalize_signature(self._signature)
        signature = result(*types)

        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return self._build(builder, arguments)

        define = {
            0: lambda _context: (signature, generate),
            1: lambda _context, a: (signature, generate),
            2: lambda _context, a, b: (signature, generate),
            3: lambda _context, a, b, c: (signature, generate),
        }[len(types)]
        made = numba().extending.intrinsic(define)
        typing = numba().core.registry.cpu_target.typing_context
        typing.refresh()  # it gets to know what was made since
        return typing.resolve_value_type(made)


def compiled(signature: str, *, nogil: bool = True) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a kernel.

    Args:
        nogil: whether it releases the interpreter. To get that back takes longer than a few
            instructions do, and another thread may keep it for milliseconds.
    """
    return lambda function: Kernel(function, signature, nogil=nogil)


def inlined(function: F) -> F:
    """Compile a function into the kernels that call it."""
    return cast(F, Inlined(function, _INLINED))


def reordered(function: F) -> F:
    """Like `inlined`; sums may be added up in any order, which changes their rounding."""
    return cast(F, Inlined(function, _REORDERED))
