"""The filters, tests and functions of Jinja that chat templates may use."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Undefined, filters

from tsqp.tee.text import origin
from tsqp.tee.text.origin import Text, concat, cut, recased, written
from tsqp.tee.text.template_methods import join, replace
from tsqp.tee.text.template_values import (
    CHARACTERS,
    Fields,
    Items,
    Stopped,
    Stream,
    fail_if_missing,
    missing,
    weigh,
)

if TYPE_CHECKING:
    from tsqp.tee.text.template_operations import Operations

EMPTY = written("")
MAX_INDENT = 64
MAX_DIGITS = 4000
MAX_PLACES = 30
MAX_PATH = 200
_FORMAT = re.compile(r"%(?:\((\w+)\))?([-#0 +]*\d{0,2}(?:\.\d{1,2})?)([sdifeEgGxXo%])")
_DATE = re.compile(r"(?:%-?[aAbBdeHIjmMpSyYZ]|%%|[^%]){0,100}")

Filter = Callable[..., Any]


def _recase(change: Callable[[str], str]) -> Filter:
    def run(run: "Operations", value: Any) -> Text:
        text = run.text(value)
        return run.allowance.text(recased(text, change(str(text))))

    return run


def _default(run: "Operations", value: Any, default: Any = EMPTY, boolean: bool = False) -> Any:
    return default if isinstance(value, Undefined) or (boolean and not value) else value


def _length(run: "Operations", value: Any) -> int:
    return len(value)


def _list(run: "Operations", value: Any) -> Items:
    return run.allowance.items(run.allowance.iterate(value))


def _first(run: "Operations", value: Any) -> Any:
    return next(run.allowance.iterate(value), missing())


def _last(run: "Operations", value: Any) -> Any:
    if not isinstance(value, str | list | tuple | dict | range):
        raise TypeError
    *_, last = [missing(), *_list(run, value)]
    return last


def _reverse(run: "Operations", value: Any) -> Any:
    if isinstance(value, str):
        return run.allowance.text(cut(value, slice(None, None, -1)))
    return Stream(reversed(_list(run, value)))


def _items(run: "Operations", value: Any) -> Stream:
    if isinstance(value, Undefined):
        return Stream(())
    if not isinstance(value, Fields):
        raise TypeError
    return Stream(run.allowance.items(map(run.allowance.row, value.items())))


def _join(run: "Operations", value: Any, d: Any = EMPTY, attribute: Any = None) -> Text:
    get = _getter(run, attribute)
    parts = [run.text(get(each)) for each in run.allowance.iterate(value)]
    return join(run.allowance, run.text(d), parts)


def _replace(run: "Operations", value: Any, old: Any, new: Any, count: int | None = None) -> Text:
    times = -1 if count is None else count
    return replace(run.allowance, run.text(value), run.text(old), run.text(new), times)


def _trim(run: "Operations", value: Any, chars: str | None = None) -> Text:
    text = run.text(value)
    run.allowance.spend_search(text, chars or "")
    return run.allowance.text(origin.strip(text, chars))


def _indent(
    run: "Operations", value: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> Text:
    if isinstance(width, int) and not 0 <= width <= MAX_INDENT:
        raise Stopped("indents too far")
    indention = written(" " * width) if isinstance(width, int) else width
    text = concat([value, written("\n")])
    run.allowance.spend(len(text) * (1 + weigh(indention)))  # as many lines as there may be
    lines = origin.locate(text, str(text).splitlines())
    indented = [concat([indention, line]) if line or blank else line for line in lines[1:]]
    result = origin.join(written("\n"), [lines[0], *indented])
    return run.allowance.text(concat([indention, result]) if first else result)


def _to_json(
    run: "Operations",
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does it: without the escapes that HTML needs."""
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise Stopped("indents too far")
    if separators is not None and max(map(len, separators)) > MAX_INDENT:
        raise Stopped("writes JSON with long separators")
    depth = getattr(value, "depth", 0)
    spaces = (depth * (indent or 0) + 2 * MAX_INDENT * (separators is not None)) // CHARACTERS
    run.allowance.spend(weigh(value) * (1 + spaces) + weigh(value) * 12 * ensure_ascii)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def percent(run: "Operations", text: str, values: Any) -> Text:
    """`text % values`."""
    run.allowance.spend(weigh(text) + str(text).count("%"))
    left = iter(values if isinstance(values, tuple) else [values])
    parts: list[str] = []
    position = 0
    for found in _FORMAT.finditer(text):
        parts.append(cut(text, slice(position, found.start())))
        position = found.end()
        name, flags, kind = found.groups()
        if kind == "%":
            parts.append(written("%"))
            continue
        value = next(left) if name is None else values[name]
        fail_if_missing(value)
        if kind == "s":
            value = run.text(value)
        parts.append(value if kind == "s" and not flags else f"%{flags}{kind}" % value)
    parts.append(cut(text, slice(position, None)))
    is_unused = next(left, left) is not left and not isinstance(values, Mapping)
    if is_unused or "%" in "".join(parts[::2]):
        raise ValueError
    return run.allowance.concat(parts)


def _format(run: "Operations", value: Any, *arguments: Any, **named: Any) -> Text:
    return percent(run, run.text(value), named or arguments)


def _number(convert: Callable[..., Any]) -> Filter:
    def run(run: "Operations", value: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(value, str) and len(value) > MAX_DIGITS:
            raise ValueError
        return run.allowance.number(convert(value, *arguments, **named))

    return run


def _round(run: "Operations", value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(value, int | float) or abs(precision) > MAX_PLACES:
        raise ValueError
    return filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _title(run: "Operations", value: Any) -> Text:
    text = run.text(value)
    run.allowance.spend(len(text))  # as many words as there may be
    return recased(text, filters.do_title(str(text)))


def _getter(run: "Operations", attribute: Any, fold_case: bool = False) -> Callable[[Any], Any]:
    """Reads an attribute, "a.b" or a number of a place, of each value; None takes the value."""
    if isinstance(attribute, str) and len(attribute) > MAX_PATH:
        raise ValueError
    path = [] if attribute is None else str(attribute).split(".")

    def get(value: Any) -> Any:
        for name in path:
            value = run.item(value, int(name) if name.isdigit() else written(name))
        return str(value).lower() if fold_case and isinstance(value, str) else value

    return get


def _weight(values: Iterable[Any]) -> int:
    return sum(map(weigh, values))


def _sort(
    run: "Operations",
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> Items:
    values = _list(run, value)
    if isinstance(attribute, str) and len(attribute) > MAX_PATH:
        raise ValueError
    names = str(attribute).split(",") if isinstance(attribute, str) else [attribute]
    getters = [_getter(run, name, not case_sensitive) for name in names]
    run.allowance.spend(_weight(values) * (1 + len(values).bit_length()))
    keys = [[get(each) for get in getters] for each in values]
    order = sorted(range(len(values)), key=lambda place: keys[place], reverse=reverse)
    return run.allowance.items(values[place] for place in order)


def _dictsort(
    run: "Operations",
    value: Any,
    case_sensitive: bool = False,
    by: str = "key",
    reverse: bool = False,
) -> Items:
    if by not in ("key", "value") or not isinstance(value, Fields):
        raise ValueError
    pairs = run.allowance.items(map(run.allowance.row, value.items()))
    return _sort(run, pairs, reverse, case_sensitive, int(by == "value"))


def _unique(
    run: "Operations", value: Any, case_sensitive: bool = False, attribute: Any = None
) -> Stream:
    get = _getter(run, attribute, not case_sensitive)
    values = _list(run, value)
    run.allowance.spend(_weight(values))
    found: dict[Any, Any] = {}
    for each in values:
        found.setdefault(get(each), each)
    return Stream(found.values())


def _extreme(choose: Callable[..., Any]) -> Filter:
    def run(
        run: "Operations", value: Any, case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        values = _list(run, value)
        run.allowance.spend(2 * _weight(values))
        get = _getter(run, attribute, not case_sensitive)
        return choose(values, key=get) if values else missing()

    return run


def _sum(run: "Operations", value: Any, attribute: Any = None, start: Any = 0) -> Any:
    get = _getter(run, attribute)
    total = start
    for each in run.allowance.iterate(value):
        total = run.add(total, get(each))
    return total


def _map(run: "Operations", value: Any, *arguments: Any, **named: Any) -> Stream:
    if isinstance(value, Undefined):
        return Stream(())
    values = run.allowance.iterate(value)
    if arguments:
        name, *rest = arguments
        return Stream(run.allowance.items(run.filter(name, each, rest, named) for each in values))
    get, default = _getter(run, named["attribute"]), named.get("default")
    found = run.allowance.items(map(get, values))
    if default is not None:
        found = run.allowance.items(_default(run, each, default) for each in found)
    return Stream(found)


def _select(keep: bool, *, by_attribute: bool) -> Filter:
    def run(run: "Operations", value: Any, *arguments: Any, **named: Any) -> Stream:
        get = _getter(run, arguments[0] if by_attribute else None)
        name, *rest = arguments[by_attribute:] or [None]

        def passes(each: Any) -> bool:
            found = get(each)
            return bool(found) if name is None else bool(run.test(name, found, rest, named))

        values = run.allowance.iterate(value)
        return Stream(run.allowance.items(each for each in values if passes(each) is keep))

    return run


FILTERS: dict[str, Filter] = {
    "abs": _number(abs),
    "capitalize": _recase(str.capitalize),
    "count": _length,
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "first": _first,
    "float": _number(filters.do_float),
    "format": _format,
    "indent": _indent,
    "int": _number(filters.do_int),
    "items": _items,
    "join": _join,
    "last": _last,
    "length": _length,
    "list": _list,
    "lower": _recase(str.lower),
    "map": _map,
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _select(False, by_attribute=False),
    "rejectattr": _select(False, by_attribute=True),
    "replace": _replace,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda run, value: run.text(value),
    "select": _select(True, by_attribute=False),
    "selectattr": _select(True, by_attribute=True),
    "sort": _sort,
    "string": lambda run, value: run.text(value),
    "sum": _sum,
    "title": _title,
    "tojson": _to_json,
    "trim": _trim,
    "unique": _unique,
    "upper": _recase(str.upper),
}
