"""Interrupts the main thread by a timer, as Ctrl-C does at some unknown moment."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 0.001


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in this block, `seconds` from its beginning."""
    before = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _is_swallowed(frame):
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    else:
        raise KeyboardInterrupt


def _is_swallowed(frame: FrameType | None) -> bool:
    """Whether Python would ignore an exception here.

    It does in callbacks of the garbage collector (Hypothesis has one), in callbacks of weak
    references, and in `__del__`.
    """
    callbacks = {getattr(each, "__code__", None) for each in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code in callbacks or code.co_name == "__del__" or "weakref" in code.co_filename:
            return True
        frame = frame.f_back
    return False
