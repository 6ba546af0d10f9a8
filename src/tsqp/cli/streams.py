"""Standard streams that may be closed, full, unread, or unable to encode a text.

An answer is never lost silently: failing to write to standard output is an error. Messages that
cannot be written to standard error are dropped, because the answer matters more.
"""

import codecs
import errno
import faulthandler
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from tsqp.errors import OutputError

UNREAD = 141  # the exit status that a shell reports for a program ended by SIGPIPE


def open_streams() -> None:
    """Make the three streams usable. Call once, before any file is opened."""
    # A file opened later would get the number of a closed stream, and receive its text.
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    elif isinstance(sys.stdin, TextIOWrapper) and _is_ascii(sys.stdin):
        sys.stdin.reconfigure(encoding="utf-8")  # a superset of ASCII
    if sys.stdout is None:  # the replacement is read-only, so that writing fails and is noticed
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


def hide_native_messages() -> None:
    """Drop what libraries in C and Rust write to descriptor 2. `sys.stderr` goes on as before.

    When code in Rust panics, as that of a tokenizer can, its runtime writes a message there before
    Python sees the exception, and the message may quote the text that was being encoded.
    `faulthandler`, which prints no values, keeps its place.
    """
    if not isinstance(sys.stderr, _Messages) or _number(sys.stderr) != 2:
        return  # hidden already, or standard error is not the process's
    sys.stderr.flush()
    kept = open(  # noqa: PTH123, SIM115
        os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
    )
    sys.stderr.replace(kept)
    if faulthandler.is_enabled():
        faulthandler.enable(kept)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


def show_native_messages() -> None:
    """Undo `hide_native_messages`."""
    if isinstance(sys.stderr, _Messages) and _number(sys.stderr) not in (2, None):
        os.dup2(sys.stderr.fileno(), 2)


def _number(stream: Any) -> int | None:
    """A stream's descriptor; None if it has none."""
    try:
        return int(stream.fileno())
    except (OSError, ValueError):
        return None


class _Wrapped:
    """A text stream with its own handling of failed writes."""

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

    def replace(self, stream: TextIOWrapper) -> None:
        """Write to another stream from now on."""
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def _is_ascii(stream: TextIOWrapper) -> bool:
    return codecs.lookup(stream.encoding).name == "ascii"
