"""The standard streams of a command, where they are closed, full, unread, or too narrow for a text.

An answer is never lost without a word: standard output that cannot be written is an error. What
standard error cannot take is dropped, as the answer matters more than what is said about it.
"""

import codecs
import errno
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from tsqp.errors import OutputError

UNREAD = 141  # the exit status of a program that SIGPIPE ends, as a shell tells it


def open_streams() -> None:
    """Make the three streams usable, whatever they are; called once, before anything is opened."""
    # A file that is opened later would get the number of a closed stream, and its text.
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    elif isinstance(sys.stdin, TextIOWrapper) and _is_ascii(sys.stdin):
        sys.stdin.reconfigure(encoding="utf-8")  # of which ASCII is a part
    if sys.stdout is None:  # what is read-only cannot be written: that is noticed
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # é in ASCII is \xe9, and not lost
    if not isinstance(sys.stdout, _Answers):
        sys.stdout = _Answers(sys.stdout)
    if not isinstance(sys.stderr, _Messages):
        sys.stderr = _Messages(sys.stderr)


class _Wrapped:
    """A text stream, but for what happens when it cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Answers(_Wrapped):
    """Standard output.

    Raises:
        OutputError: it cannot be written.
        SystemExit: nobody reads it any more, as behind `| head`.
    """

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as exc:
            raise self._failure(exc) from exc

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as exc:
            raise self._failure(exc) from exc

    def _failure(self, exc: OSError) -> BaseException:
        with suppress(OSError, ValueError):  # Python flushes once more at its end
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        if isinstance(exc, BrokenPipeError):
            return SystemExit(UNREAD)
        reason = "it is closed" if exc.errno == errno.EBADF else exc.strerror
        return OutputError(f"Cannot write to standard output: {reason}.")


class _Messages(_Wrapped):
    """Standard error."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _is_ascii(stream: TextIOWrapper) -> bool:
    return codecs.lookup(stream.encoding).name == "ascii"
