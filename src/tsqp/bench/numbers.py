"""Lists of numbers on the command line of benchmarks."""

from tsqp.errors import UsageError


def parse_numbers(text: str, option: str, most: int) -> list[int]:
    """Parse numbers such as "1,16"; returns each once, the smallest first.

    Args:
        option: the option that was given, for the message.
        most: the largest number allowed.

    Raises:
        UsageError: it is not a list of numbers from 1 to `most`.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= most for part in parts):
        raise UsageError(f"{option} takes numbers from 1 to {most}, separated by commas.")
    return sorted({int(part) for part in parts})
