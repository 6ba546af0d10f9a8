"""The values that a chat template works with, and the limit of its work.

Every list and object knows its weight: the number of values that it holds. Texts count by their
length, and repeated values count again. Code that walks through a value pays for its weight first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import Undefined

from tsqp.tee.text.origin import CALLER, Text, concat, cut, text_of, written

BASE_UNITS = 1_000_000  # a conversation of a thousand messages takes about a tenth
UNITS_FOR_WEIGHT = 64  # more for each unit of what the caller gave
CHARACTERS = 16  # this much text weighs as much as one other value
MAX_BITS = 256  # largest integer
MAX_RANGE = 100_000
MAX_DEPTH = 64  # nesting of lists and objects

# Their names count as words of the template: it builds control tokens of them, such as "<|user|>".
ROLES = frozenset(
    ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
)


class TemplateFault(Exception):
    """The template cannot go on. No message of these exceptions holds words of the conversation."""


class Stopped(TemplateFault):
    """The template exceeded its limits; the message completes "it ..."."""


class NotAllowed(TemplateFault):
    """The template used something that is not allowed here; the message names it."""


class Refused(TemplateFault):
    """The template called `raise_exception`.

    Attributes:
        sentence: its message, which may quote the conversation.
    """

    def __init__(self, sentence: object) -> None:
        super().__init__()
        self.sentence = sentence


class MissingValue(TemplateFault):
    """The template needed a missing value; the message is the name, or empty."""


class Items(list[Any]):
    """A list."""

    weight = 1
    depth = 1


class Row(tuple[Any, ...]):
    """A tuple."""

    weight = 1
    depth = 1


class Fields(dict[Any, Any]):
    """An object."""

    weight = 1
    depth = 1


class Opaque:
    """A value that a template can hold and use, but not write. It has no weight."""

    def __repr__(self) -> str:
        raise NotAllowed("a value that cannot be written")


class Stream(Opaque):
    """Values that can be iterated once, as Jinja's lazy filters return them."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = iter(values)

    def __iter__(self) -> Iterator[Any]:
        return self._values


class Namespace(Opaque):
    """The result of `namespace(...)`: the only value that a template can change."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = {}
        for name, value in values.items():
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise NotAllowed("names that begin with an underscore")
        self.values[name] = value


@dataclass(frozen=True, eq=False, repr=False)
class Method(Opaque):
    """A method of a value, before it is called."""

    owner: Any
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class Macro(Opaque):
    """A macro of the template; `call` takes its arguments and those with names."""

    call: Callable[[list[Any], dict[str, Any]], str]


@dataclass(frozen=True, eq=False, repr=False)
class Function(Opaque):
    """A function that every template has; `call` takes the `Operations` of the rendering first."""

    call: Callable[..., Any]


def weigh(value: Any) -> int:
    """The weight of a value: how many values it contains."""
    if isinstance(value, Items | Row | Fields):
        return value.weight
    if isinstance(value, str):
        return 1 + len(value) // CHARACTERS
    return len(value) if isinstance(value, range) else 1


Container = TypeVar("Container", Items, Row, Fields)


def _settle(container: Container, values: Iterable[Any]) -> Container:
    """Note the weight and the depth of a new container."""
    weight, depth = 1, 0
    for value in values:
        weight += weigh(value)
        if isinstance(value, Items | Row | Fields):
            depth = max(depth, value.depth)
    container.weight, container.depth = weight, depth + 1
    return container


def adopt(value: Any) -> Any:
    """Plain JSON values, checked by the caller, as values of a template."""
    if isinstance(value, dict):
        fields = Fields((name, adopt(item)) for name, item in value.items())
        return _settle(fields, [*fields.keys(), *fields.values()])
    if isinstance(value, list | tuple):
        items = Items(map(adopt, value))
        return _settle(items, items)
    return value


def adopt_conversation(messages: list[dict[str, Any]]) -> Items:
    """The messages of a conversation; a role that is known counts as the template's word."""
    conversation: Items = adopt(messages)
    for message in conversation:
        if message.get("role") in ROLES:
            message["role"] = written(message["role"])
    return conversation


def missing(name: str = "") -> Undefined:
    """A value that does not exist: written as an empty text; any other use raises MissingValue."""
    return _undefined(name, MissingValue(name))


def forbidden(what: str) -> Undefined:
    """Likewise, for what templates may not use."""
    return _undefined("", NotAllowed(what))


def _undefined(name: str, fault: TemplateFault) -> Undefined:
    return Undefined(name=name, exc=lambda _: fault)  # type: ignore[arg-type]


def fail_if_missing(*values: Any) -> None:
    """Raise the fault of the first value that is not there."""
    for value in values:
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()


class Allowance:
    """The work that one rendering may do, in units of about a microsecond.

    Args:
        given: the weight of what the caller gave.
    """

    def __init__(self, given: int) -> None:
        self.total = self._left = BASE_UNITS + UNITS_FOR_WEIGHT * given

    def spend(self, units: int) -> None:
        """Raise Stopped if there is not as much left."""
        self._left -= units
        if self._left < 0:
            raise Stopped("runs for too long or makes too much of its values")

    def spend_search(self, text: str, wanted: str) -> None:
        """Pay for the slowest possible search for one text in another."""
        self.spend(weigh(text) * weigh(wanted))

    def text(self, text: Text) -> Text:
        """Pay for a new text."""
        self.spend(1 + len(text) // CHARACTERS)
        return text

    def concat(self, parts: list[str]) -> Text:
        """The parts, one after the other."""
        self.spend(len(parts) + sum(map(len, parts)) // CHARACTERS)
        return concat(parts)

    def items(self, values: Iterable[Any]) -> Items:
        """A new list."""
        return self._checked(_settle(items := Items(self._counted(values)), items))

    def row(self, values: Iterable[Any]) -> Row:
        """A new tuple."""
        return self._checked(_settle(row := Row(self._counted(values)), row))

    def fields(self, pairs: Iterable[tuple[Any, Any]]) -> Fields:
        """A new object."""
        fields = Fields()
        for key, value in pairs:
            self.spend(1 + weigh(key))  # which is hashed
            fields[key] = value
        return self._checked(_settle(fields, [*fields.keys(), *fields.values()]))

    def iterate(self, value: Any) -> Iterator[Any]:
        """Go through a value, and pay for each step; the characters of a text are texts.

        Raises:
            TypeError: it is not something to go through.
        """
        if isinstance(value, str):
            return self._counted(cut(value, place) for place in range(len(value)))
        if not isinstance(value, list | tuple | dict | range | Stream | Undefined):
            raise TypeError
        return self._counted(value)

    def number(self, value: Any) -> Any:
        """The result of arithmetic."""
        if isinstance(value, complex):
            raise TypeError
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise Stopped("computes with numbers that are too large")
        return value

    def repeat(self, value: Any, times: int) -> Any:
        """`value * times`, for a text, a list or a tuple."""
        times = max(0, times)
        self.spend(1 + weigh(value) * times + len(value) * times // CHARACTERS)
        if isinstance(value, str):
            origin = value.origin if isinstance(value, Text) else CALLER * len(value)
            return text_of(str(value) * times, origin * times)
        return self.row(value * times) if isinstance(value, Row) else self.items(value * times)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value

    def _checked(self, container: Container) -> Container:
        if container.weight > self.total or container.depth > MAX_DEPTH:
            raise Stopped("makes lists that are too large or too deep")
        return container
