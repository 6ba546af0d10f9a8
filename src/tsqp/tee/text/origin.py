"""Texts that record which of their characters a chat template wrote.

All other characters come from the conversation. A plain `str` counts as coming from there, so if an
operation loses the origin of characters, they never count as the template's text.
"""

from collections.abc import Iterable, Sequence

TEMPLATE = "t"
CALLER = "c"


class Text(str):
    """A text of a chat template.

    Attributes:
        origin: as long as the text: `TEMPLATE` or `CALLER` for each character.
    """

    __slots__ = ("origin",)

    origin: str


def text_of(value: str, origin: str) -> Text:
    """The characters of `value`, with the origin of each."""
    assert len(value) == len(origin)
    text = Text(value)
    text.origin = origin
    return text


def written(value: str) -> Text:
    """A text that the template wrote."""
    return text_of(value, TEMPLATE * len(value))


def origin_of(value: str) -> str:
    """Where each character of a text came from."""
    return value.origin if isinstance(value, Text) else CALLER * len(value)


def is_written(value: str) -> bool:
    """Whether the template wrote every character."""
    return CALLER not in origin_of(value)


def concat(parts: Sequence[str]) -> Text:
    """The parts, one after the other."""
    return text_of("".join(parts), "".join(map(origin_of, parts)))


def cut(value: str, where: slice | int) -> Text:
    """`value[where]`, with its origin."""
    return text_of(str.__getitem__(value, where), origin_of(value)[where])


def strip(value: str, chars: str | None, *, left: bool = True, right: bool = True) -> Text:
    """`value.strip(chars)`, or `lstrip` or `rstrip`, with its origin."""
    start = len(value) - len(value.lstrip(chars)) if left else 0
    end = len(value.rstrip(chars)) if right else len(value)
    return cut(value, slice(start, max(start, end)))


def locate(value: str, pieces: Iterable[str]) -> list[str]:
    """Pieces that a method such as `split` cut from a text, in their order, with their origin."""
    found: list[str] = []
    position = 0
    for piece in pieces:
        position = value.find(piece, position)
        found.append(cut(value, slice(position, position + len(piece))))
        position += len(piece)
    return found


def split(value: str, pieces: Iterable[str], separator: str) -> list[str]:
    """As `locate`, for pieces that the separator stood between."""
    found: list[str] = []
    position = 0
    for piece in pieces:
        found.append(cut(value, slice(position, position + len(piece))))
        position += len(piece) + len(separator)
    return found


def join(separator: str, parts: Sequence[str]) -> Text:
    """`separator.join(parts)`, with its origin."""
    between = [each for part in parts for each in (separator, part)]
    return concat(between[1:])


def recased(value: str, result: str) -> Text:
    """`result`, which has the characters of `value` in another case.

    Where some became several, all count as the caller's, unless the template wrote them all.
    """
    if is_written(value):
        return written(result)
    if len(result) == len(value):  # no character becomes shorter, so each is in its place
        return text_of(result, origin_of(value))
    return text_of(result, CALLER * len(result))
