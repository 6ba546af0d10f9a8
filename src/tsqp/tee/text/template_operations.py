"""The operations of chat templates on values. Each is paid for before it is done."""

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Undefined
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import LoopContext
from jinja2.tests import TESTS as JINJA_TESTS

from tsqp.tee.text.origin import cut, written
from tsqp.tee.text.template_filters import FILTERS, percent
from tsqp.tee.text.template_functions import COMPARISONS, TESTS
from tsqp.tee.text.template_methods import loop_attribute, methods_of
from tsqp.tee.text.template_values import (
    MAX_BITS,
    Allowance,
    Fields,
    Function,
    Items,
    Macro,
    Method,
    Namespace,
    NotAllowed,
    Row,
    Stopped,
    Stream,
    fail_if_missing,
    forbidden,
    missing,
    weigh,
)


class Operations:
    """The operations of one rendering.

    Raises from every method, besides the faults of template_values: what Python raises for values
    that do not go together.
    """

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance

    def text(self, value: Any) -> str:
        """The text of a value in the output."""
        if isinstance(value, str):
            return value
        if isinstance(value, Undefined):
            return written("")
        if value is None or isinstance(value, bool | int | float):
            return written(str(value))
        if not isinstance(value, Items | Row | Fields | range):
            raise NotAllowed("a value that cannot be written")
        self.allowance.spend(weigh(value))
        return str(value)

    def filter(self, name: str, value: Any, arguments: Iterable[Any], named: Any) -> Any:
        """Apply a filter."""
        if name not in FILTERS:
            raise NotAllowed(f"the filter {name}" if name in JINJA_FILTERS else "an unknown filter")
        return FILTERS[name](self, value, *arguments, **named)

    def test(self, name: str, value: Any, arguments: Iterable[Any], named: Any) -> Any:
        """Apply a test."""
        if name not in TESTS:
            raise NotAllowed(f"the test {name}" if name in JINJA_TESTS else "an unknown test")
        return TESTS[name](self, value, *arguments, **named)

    def compare(self, operation: str, left: Any, right: Any) -> bool:
        """Compare two values."""
        if operation not in ("in", "notin"):
            self.allowance.spend(min(weigh(left), weigh(right)))
        elif isinstance(left, str) and isinstance(right, str):
            self.allowance.spend_search(right, left)
        else:
            self.allowance.spend(weigh(left) + weigh(right))
            if isinstance(right, Stream | Undefined):
                right = list(self.allowance.iterate(right))
        return bool(COMPARISONS[operation](left, right))

    def is_callable(self, value: Any) -> bool:
        """Whether Jinja takes a value for something to call; it does so with a missing one."""
        return isinstance(value, Method | Macro | Function | Undefined)

    def attribute(self, value: Any, name: str) -> Any:
        """`value.name`: as in Jinja, a method before a field."""
        if isinstance(value, Namespace | LoopContext):
            return self.item(value, name, name)
        fail_if_missing(value)
        methods, all_names = methods_of(value)
        if name in methods:
            return Method(value, name)
        if name in all_names:
            return forbidden(f"the method {name!r}")
        return value.get(name, missing(name)) if isinstance(value, Fields) else missing(name)

    def item(self, value: Any, key: Any, name: str = "") -> Any:
        """`value[key]`: as in Jinja, a field before a method.

        Args:
            name: the key, if it is a constant of the template.
        """
        fail_if_missing(value)
        self.allowance.spend(weigh(key))
        if isinstance(value, Fields) and key in value:
            return value[key]
        if isinstance(value, str | list | tuple | range) and isinstance(key, int):
            if not -len(value) <= key < len(value):
                return missing(name)
            return cut(value, key) if isinstance(value, str) else value[key]
        if isinstance(value, Namespace):
            return value.values.get(key, missing(name))
        if isinstance(value, LoopContext):
            return loop_attribute(value, key, missing(name))
        if isinstance(key, str):
            methods, all_names = methods_of(value)
            if key in methods:
                return Method(value, key)
            if key in all_names:
                return forbidden("a method that templates may not use")
        return missing(name)

    def call(self, function: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        """Call what a template calls."""
        if isinstance(function, Method):
            methods, _ = methods_of(function.owner)
            return methods[function.name](self.allowance, function.owner, *arguments, **named)
        if isinstance(function, Macro):
            return function.call(arguments, named)
        fail_if_missing(function)
        if not isinstance(function, Function):
            raise TypeError
        return function.call(self, *arguments, **named)

    def add(self, left: Any, right: Any) -> Any:
        """`left + right`."""
        fail_if_missing(left, right)
        if isinstance(left, str) and isinstance(right, str):
            return self.allowance.concat([left, right])
        if isinstance(left, list) and isinstance(right, list):
            return self.allowance.items([*left, *right])
        if isinstance(left, tuple) and isinstance(right, tuple):
            return self.allowance.row([*left, *right])
        return self._arithmetic(left, right, lambda a, b: a + b)

    def multiply(self, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int):
                return self.allowance.repeat(value, times)
        return self._arithmetic(left, right, lambda a, b: a * b)

    def modulo(self, left: Any, right: Any) -> Any:
        if isinstance(left, str):
            return percent(self, left, right)
        return self._arithmetic(left, right, lambda a, b: a % b)

    def power(self, left: Any, right: Any) -> Any:
        if isinstance(right, int) and abs(right) > MAX_BITS:
            raise Stopped("computes with numbers that are too large")
        return self._arithmetic(left, right, lambda a, b: a**b)

    def _arithmetic(self, left: Any, right: Any, compute: Callable[[Any, Any], Any]) -> Any:
        fail_if_missing(left, right)
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TypeError
        return self.allowance.number(compute(left, right))

    def subtract(self, left: Any, right: Any) -> Any:
        """`left - right`."""
        return self._arithmetic(left, right, lambda a, b: a - b)

    def divide(self, left: Any, right: Any) -> Any:
        """`left / right`."""
        return self._arithmetic(left, right, lambda a, b: a / b)

    def divide_down(self, left: Any, right: Any) -> Any:
        """`left // right`."""
        return self._arithmetic(left, right, lambda a, b: a // b)
