"""Words in memory that another process reads or writes at the same time, in a stated order.

Python has no such loads and stores, so these are compiled. LLVM's orders hold on every processor:
on x86-64 an acquiring load and a releasing store are plain moves, which it never reorders with each
other, and a fence is `mfence`; on arm64 they are `ldar`, `stlr` and `dmb ish`.
"""

import platform
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from tsqp.algebra.compiler import numba
from tsqp.algebra.native import Instruction, compiled

CAN_ORDER = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")

_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_MANY_SPINS = 2000  # to measure how long one takes


def _word() -> Any:
    return _ir().IntType(64)


def _ir() -> Any:
    """llvmlite's, as numba uses it."""
    return numba().core.cgutils.ir


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _word().as_pointer())


def _call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    kind = _ir().FunctionType(result, [each.type for each in arguments])
    cgutils = numba().core.cgutils
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _build_load(builder: Any, arguments: Sequence[Any]) -> Any:
    return builder.load_atomic(_at(builder, arguments[0]), "acquire", 8)


def _build_store(builder: Any, arguments: Sequence[Any]) -> Any:
    address, value = arguments
    builder.store_atomic(value, _at(builder, address), "release", 8)
    return value


def _build_fence(builder: Any, _arguments: Sequence[Any]) -> Any:
    builder.fence("seq_cst")
    return _word()(0)


def _build_pause(builder: Any, _arguments: Sequence[Any]) -> Any:
    """Tell the processor that this loop waits. On arm64, most do nothing at the hint "yield"."""
    if _IS_X86:
        _call(builder, "llvm.x86.sse2.pause", _ir().VoidType(), [])
    else:
        whole_system = _ir().IntType(32)(15)
        _call(builder, "llvm.aarch64.isb", _ir().VoidType(), [whole_system])
    return _word()(0)


def _build_yield(builder: Any, _arguments: Sequence[Any]) -> Any:
    return builder.sext(_call(builder, "sched_yield", _ir().IntType(32), []), _word())


_load = Instruction("int64(int64)", _build_load)
_store = Instruction("int64(int64, int64)", _build_store)
_fence = Instruction("int64()", _build_fence)
_pause = Instruction("int64()", _build_pause)
_yield = Instruction("int64()", _build_yield)


@compiled("int64(int64, int64, int64)", nogil=False)
def publish(address: int, value: int, flag: int) -> int:
    """Store `value` at `address` after all earlier stores, and then load the word at `flag`."""
    _store(address, value)
    _fence()
    return int(_load(flag))


@compiled("int64(int64, int64)", nogil=False)
def announce(address: int, value: int) -> int:
    """Store `value` at `address` before all later loads."""
    _store(address, value)
    return int(_fence())


@compiled("boolean(int64, int64, int64, int64)")
def await_word(address: int, value: int, spins: int, yields: int) -> bool:
    """Look at the word at `address` until it is `value`; returns whether it is.

    Later loads see what the writer stored before this word. The interpreter is released.

    Args:
        spins: looks at most while this thread keeps its core.
        yields: looks at most after that; before each, the core is offered to other threads.
    """
    if _load(address) == value:
        return True
    for _ in range(spins):
        _pause()
        if _load(address) == value:
            return True
    for _ in range(yields):
        _yield()
        if _load(address) == value:
            return True
    return False


@cache
def spins_in(seconds: float) -> int:
    """The number of spins that take about so long here."""
    import numpy as np

    word = np.zeros(1, np.int64)
    address = word.ctypes.data
    await_word.compile()
    times = []
    for _ in range(5):  # the least: others may use the core meanwhile
        began = time.perf_counter()
        await_word(address, 1, _MANY_SPINS, 0)
        times.append(time.perf_counter() - began)
    return max(1, round(seconds * _MANY_SPINS / min(times)))
