"""Tracebacks for --debug, which must not show what a user asked."""

import traceback
from collections.abc import Set

from tsqp.errors import TSQPError

WITHHELD = "(message withheld, as it may quote a prompt)"


def without_foreign_messages(error: BaseException) -> str:
    """The traceback of an exception and of its causes, with the messages of TSQPErrors only.

    Other libraries quote what they could not parse. Their types and frames are shown; frames have
    lines of source code and no values.
    """
    return _format(error, frozenset())


def _format(error: BaseException, seen: Set[int]) -> str:
    before, link = error.__cause__, "The above exception was the direct cause of the following"
    if before is None and not error.__suppress_context__:
        before, link = error.__context__, "During handling of the above exception, another occurred"
    text = ""
    if before is not None and id(before) not in seen:
        text = f"{_format(before, seen | {id(error)})}\n{link}:\n\n"
    if error.__traceback__ is not None:
        text += "Traceback (most recent call last):\n"
        text += "".join(traceback.format_tb(error.__traceback__))
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    return f"{text}{name}: {error if isinstance(error, TSQPError) else WITHHELD}\n"
