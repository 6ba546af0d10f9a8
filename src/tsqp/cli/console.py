"""Lines on standard error, and text that is safe to show in a terminal."""

from rich.console import Console

from tsqp.runtime.quiet import is_quiet

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

# A terminal obeys control characters, and the others reorder the text around them.
_ACTIVE = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN = dict.fromkeys(_ACTIVE, "\ufffd") | {ord(each): each for each in "\n\t"} | {ord("\r"): None}


def for_terminal(text: str) -> str:
    """A text of a model or a server without the characters that a terminal would obey.

    Line feeds and tabs stay.
    """
    return text.translate(_SHOWN)


def say(text: str) -> None:
    """Print a line on standard error that --quiet keeps: an error, or requested output."""
    stderr.print(text)


def note(text: str) -> None:
    """Print a line on standard error, unless --quiet was given."""
    if not is_quiet():
        say(text)
