"""Raises an exception before one opcode of a call, as Ctrl-C may at almost any of them."""

import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any


class Injected(BaseException):
    """What is raised from outside."""


class _Bomb:
    """Counts the opcodes that are run in some files, and raises before the one of a number."""

    def __init__(self, files: tuple[Path, ...], at: int) -> None:
        self._files = {str(file) for file in files}
        self._left = at
        self.went_off = False

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.went_off:
            if self._left == 0:
                self.went_off = True
                raise Injected
            self._left -= 1
        return self.trace


def at_every_opcode(
    run: Callable[[], None], *modules: Any, first: int = 0, step: int = 1
) -> Iterator[int]:
    """Call `run` again and again, each time raising before a later opcode of these modules' files.

    Ends with the first call that nothing was raised in. `run` may let `Injected` pass, or not.

    Yields:
        after each call in which it was raised, the number of the opcode.
    """
    files = tuple(Path(module.__file__) for module in modules)
    before = sys.gettrace()
    for at in count(first, step):
        bomb = _Bomb(files, at)
        sys.settrace(bomb.trace)
        try:
            run()
        except Injected:
            pass
        finally:
            sys.settrace(before)
        if not bomb.went_off:
            return
        yield at
