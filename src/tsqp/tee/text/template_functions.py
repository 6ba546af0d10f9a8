"""The tests and functions of Jinja that chat templates may use."""

import operator
import re
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2.tests import TESTS as JINJA_TESTS

from tsqp.tee.text.origin import Text, written
from tsqp.tee.text.template_values import (
    MAX_RANGE,
    Fields,
    Function,
    Namespace,
    NotAllowed,
    Refused,
    Stopped,
    weigh,
)

if TYPE_CHECKING:
    from tsqp.tee.text.template_operations import Operations

Test = Callable[..., Any]
_DATE = re.compile(r"(?:%-?[aAbBcdDeFHIjmMpRSTuUVwWxXyYzZ%]|[^%]){0,100}")

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda value, values: value in values,
    "notin": lambda value, values: value not in values,
}
_KINDS = (
    "boolean", "defined", "divisibleby", "even", "false", "float", "integer", "iterable",
    "lower", "mapping", "none", "number", "odd", "sameas", "sequence", "string", "true",
    "undefined", "upper",
)  # fmt: skip
_COMPARING = {
    "eq": ("eq", "==", "equalto"),
    "ne": ("ne", "!="),
    "lt": ("lt", "<", "lessthan"),
    "lteq": ("le", "<="),
    "gt": ("gt", ">", "greaterthan"),
    "gteq": ("ge", ">="),
    "in": ("in",),
}


def _kind(question: Any) -> Test:
    def run(run: "Operations", value: Any, *arguments: Any) -> bool:
        run.allowance.spend(weigh(value))
        return bool(question(value, *arguments))

    return run


def _comparing(operation: str) -> Test:
    return lambda run, value, other: run.compare(operation, value, other)


TESTS: dict[str, Test] = {
    **{name: _kind(JINJA_TESTS[name]) for name in _KINDS},
    **{name: _comparing(each) for each, names in _COMPARING.items() for name in names},
    "callable": lambda run, value: run.is_callable(value),
}


def _range(run: "Operations", *arguments: int) -> range:
    found = range(*arguments)
    if len(found) > MAX_RANGE:
        raise Stopped("counts too far")
    return found


def _dict(run: "Operations", *arguments: Any, **named: Any) -> Fields:
    [given] = arguments or [Fields()]
    pairs = given.items() if isinstance(given, Fields) else run.allowance.iterate(given)
    return run.allowance.fields([*((key, value) for key, value in pairs), *named.items()])


def _namespace(run: "Operations", *arguments: Any, **named: Any) -> Namespace:
    return Namespace(_dict(run, *arguments, **named))


def _raise_exception(run: "Operations", message: Any) -> NoReturn:
    raise Refused(message)


def _strftime_now(run: "Operations", form: str) -> Text:
    if not _DATE.fullmatch(form):
        raise NotAllowed("a date in a form that is not known")
    return written(datetime.now().strftime(form))


FUNCTIONS = {
    "dict": Function(_dict),
    "namespace": Function(_namespace),
    "raise_exception": Function(_raise_exception),
    "range": Function(_range),
    "strftime_now": Function(_strftime_now),
}
