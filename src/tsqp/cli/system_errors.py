"""One-sentence messages for failures of the operating system, which only the user can remedy.

Most of these failures are caught where they happen, with a more specific message. This is for the
rest.
"""

import errno
import os

from tsqp.errors import OutOfMemory, TSQPError, printable_path

WHAT_TO_DO = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOENT: "make it first, or name another place",
    errno.ENOTDIR: "a part of its path is a file: name another place",
    errno.EISDIR: "name a file in it",
    errno.EROFS: "name another place",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close some programs, or use a smaller model",
    errno.EAGAIN: "raise `ulimit -u`, or close some programs",
}
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad alloc",
    "bad_alloc",
)
NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")


def describe(exc: Exception) -> TSQPError | None:
    """The error to show for a failure of the system; None if the fault is in our own code."""
    if isinstance(exc, OSError) and exc.errno is not None:
        what = f"{printable_path(os.fsdecode(exc.filename))}: " if _is_path(exc.filename) else ""
        reason = exc.strerror or type(exc).__name__
        advice = WHAT_TO_DO.get(exc.errno)
        return TSQPError(f"{what}{reason}{f'; {advice}' if advice else ''}.")
    text = str(exc)
    if isinstance(exc, MemoryError) or any(each in text.lower() for each in NO_MEMORY):
        return OutOfMemory(
            "There is not enough memory; close some programs, or use a smaller model."
        )
    if isinstance(exc, RuntimeError) and any(each in text for each in NO_THREAD):
        return TSQPError("The system allows no more threads; raise `ulimit -u`.")
    return None


def _is_path(name: object) -> bool:
    return isinstance(name, str | bytes)
