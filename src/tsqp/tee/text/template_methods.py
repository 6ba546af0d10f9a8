"""The methods of texts, lists and objects that chat templates may call."""

from collections.abc import Callable
from typing import Any

from tsqp.tee.text import origin
from tsqp.tee.text.origin import Text, cut, recased
from tsqp.tee.text.template_values import Allowance, Items, Row, weigh

MAX_BACKWARDS = 256  # characters of a text that is looked for from the end, which is slow

Function = Callable[..., Any]


def _recase(change: Callable[[str], str]) -> Function:
    def run(allowance: Allowance, text: str) -> Text:
        return allowance.text(recased(text, change(str(text))))

    return run


def _ask(question: Function) -> Function:
    """A method that answers with a number or a bool, in time that the length of the text bounds."""

    def run(allowance: Allowance, text: str, *arguments: Any) -> Any:
        allowance.spend(weigh(text) + sum(map(weigh, arguments)))
        return question(text, *arguments)

    return run


def _search(look: Function, *, backwards: bool = False) -> Function:
    def run(allowance: Allowance, text: str, wanted: str, *places: int) -> Any:
        _pay_for_search(allowance, text, wanted, backwards=backwards)
        return look(text, wanted, *places)

    return run


def _pay_for_search(
    allowance: Allowance, text: str, wanted: str, *, backwards: bool = False
) -> None:
    if backwards and len(wanted) > MAX_BACKWARDS:
        raise ValueError
    allowance.spend_search(text, wanted)


def _stripping(*, left: bool = True, right: bool = True) -> Function:
    def run(allowance: Allowance, text: str, chars: str | None = None) -> Text:
        allowance.spend_search(text, chars or "")
        return allowance.text(origin.strip(text, chars, left=left, right=right))

    return run


def _splitting(method: Callable[[str, str | None, int], list[str]], backwards: bool) -> Function:
    def run(allowance: Allowance, text: str, sep: str | None = None, maxsplit: int = -1) -> Items:
        _pay_for_search(allowance, text, sep or "", backwards=backwards)
        allowance.spend(len(text) // 2 if sep is None else str(text).count(sep))
        pieces = method(str(text), sep, maxsplit)
        found = origin.locate(text, pieces) if sep is None else origin.split(text, pieces, sep)
        return allowance.items(found)

    return run


def _partition(method: Callable[[str, str], tuple[str, ...]], backwards: bool) -> Function:
    def run(allowance: Allowance, text: str, sep: str) -> Row:
        _pay_for_search(allowance, text, sep, backwards=backwards)
        return allowance.row(origin.locate(text, method(str(text), sep)))

    return run


def _splitlines(allowance: Allowance, text: str, keepends: bool = False) -> Items:
    allowance.spend(len(text))  # as many as there may be
    lines = origin.locate(text, str(text).splitlines(keepends=True))
    if not keepends:
        lines = [cut(line, slice(0, len(line.splitlines()[0]))) for line in lines]
    return allowance.items(lines)


def replace(allowance: Allowance, text: str, old: str, new: str, count: int = -1) -> Text:
    """`text.replace(old, new, count)`, for an `old` that is not empty."""
    if not isinstance(new, str):
        raise TypeError
    allowance.spend_search(text, old)
    found = str(text).count(old)
    allowance.spend(weigh(text) + found * weigh(new) + found)
    return origin.join(new, origin.split(text, str(text).split(old, count), old))


def join(allowance: Allowance, separator: str, parts: Any) -> Text:
    """`separator.join(parts)`."""
    texts = list(allowance.iterate(parts))
    allowance.spend(sum(weigh(text) + weigh(separator) for text in texts))
    return origin.join(separator, texts)


def _removeprefix(allowance: Allowance, text: str, prefix: str) -> Text:
    allowance.spend(weigh(text))
    start = len(prefix) if text.startswith(prefix) else 0
    return allowance.text(cut(text, slice(start, None)))


def _removesuffix(allowance: Allowance, text: str, suffix: str) -> Text:
    allowance.spend(weigh(text))
    end = len(text) - len(suffix) if text.endswith(suffix) else len(text)
    return allowance.text(cut(text, slice(0, end)))


TEXT_METHODS: dict[str, Function] = {
    "capitalize": _recase(str.capitalize),
    "count": _search(str.count),
    "endswith": _ask(str.endswith),
    "find": _search(str.find),
    "index": _search(str.index),
    "isalnum": _ask(str.isalnum),
    "isalpha": _ask(str.isalpha),
    "isascii": _ask(str.isascii),
    "isdecimal": _ask(str.isdecimal),
    "isdigit": _ask(str.isdigit),
    "islower": _ask(str.islower),
    "isnumeric": _ask(str.isnumeric),
    "isspace": _ask(str.isspace),
    "istitle": _ask(str.istitle),
    "isupper": _ask(str.isupper),
    "join": join,
    "lower": _recase(str.lower),
    "lstrip": _stripping(right=False),
    "partition": _partition(str.partition, backwards=False),
    "removeprefix": _removeprefix,
    "removesuffix": _removesuffix,
    "replace": replace,
    "rfind": _search(str.rfind, backwards=True),
    "rindex": _search(str.rindex, backwards=True),
    "rpartition": _partition(str.rpartition, backwards=True),
    "rsplit": _splitting(str.rsplit, backwards=True),
    "rstrip": _stripping(left=False),
    "split": _splitting(str.split, backwards=False),
    "splitlines": _splitlines,
    "startswith": _ask(str.startswith),
    "strip": _stripping(),
    "swapcase": _recase(str.swapcase),
    "title": _recase(str.title),
    "upper": _recase(str.upper),
}


def _get(allowance: Allowance, fields: dict[Any, Any], key: Any, default: Any = None) -> Any:
    allowance.spend(weigh(key))
    return fields.get(key, default)


def _compared(look: Function) -> Function:
    def run(allowance: Allowance, values: Any, wanted: Any) -> Any:
        allowance.spend(weigh(values) + weigh(wanted))
        return look(values, wanted)

    return run


OBJECT_METHODS: dict[str, Function] = {
    "get": _get,
    "items": lambda allowance, fields: allowance.items(map(allowance.row, fields.items())),
    "keys": lambda allowance, fields: allowance.items(fields),
    "values": lambda allowance, fields: allowance.items(fields.values()),
    "copy": lambda allowance, fields: allowance.fields(fields.items()),
}
LIST_METHODS: dict[str, Function] = {
    "count": _compared(lambda values, wanted: values.count(wanted)),
    "index": _compared(lambda values, wanted: values.index(wanted)),
    "copy": lambda allowance, values: allowance.items(values),
}
_METHODS = (
    (str, TEXT_METHODS, frozenset(dir(str))),
    (dict, OBJECT_METHODS, frozenset(dir(dict))),
    ((list, tuple), LIST_METHODS, frozenset(dir(list) + dir(tuple))),
)


def methods_of(value: Any) -> tuple[dict[str, Function], frozenset[str]]:
    """The methods that templates may call, and the names of all attributes that Python has."""
    for kind, methods, names in _METHODS:
        if isinstance(value, kind):
            return methods, names
    return {}, frozenset()


def loop_attribute(loop: Any, name: str, default: Any) -> Any:
    """An attribute of the `loop` of a `for`, or `default`."""
    read = _LOOP.get(name)
    return default if read is None else read(loop)


_LOOP: dict[str, Callable[[Any], Any]] = {
    "index": lambda loop: loop.index,
    "index0": lambda loop: loop.index0,
    "revindex": lambda loop: loop.revindex,
    "revindex0": lambda loop: loop.revindex0,
    "first": lambda loop: loop.first,
    "last": lambda loop: loop.last,
    "length": lambda loop: loop.length,
    "depth": lambda loop: loop.depth,
    "depth0": lambda loop: loop.depth0,
    "previtem": lambda loop: loop.previtem,
    "nextitem": lambda loop: loop.nextitem,
}
