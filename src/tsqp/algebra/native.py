"""How loops over whole arrays become machine code: numba, compiled when the module is imported.

No cache on disk, which would be unpickled code; no parallel loops, two of which at once abort the
process: callers split rows over a thread pool, for which every kernel releases the interpreter.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(*signatures: str) -> Callable[[F], F]:
    """Compile a function for these signatures now."""
    return cast("Callable[[F], F]", numba.njit(list(signatures), nogil=True, error_model="numpy"))


def inlined(function: F) -> F:
    """Compile a function into the compiled functions that call it."""
    return cast(F, numba.njit(nogil=True, error_model="numpy")(function))
