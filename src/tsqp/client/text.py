"""Text from outside, made safe to print."""

MAX_PRINTED = 300  # characters


def printable(text: str) -> str:
    """The text on one line without control characters, and not longer than 300 characters."""
    shown = "".join(char if char.isprintable() else " " for char in text[: MAX_PRINTED + 1])
    shown = " ".join(shown.split())
    return shown if len(text) <= MAX_PRINTED else shown[:MAX_PRINTED] + "…"
