"""A Jinja environment for templates that come with a model, and that nobody has read.

Jinja's sandbox keeps a template from Python's internals. What it does not bound is bounded here: a
template may run a number of lines and a time, and may build texts and lists up to a size. It gets
the filters, methods and functions that chat templates use, and no others.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LINES = 200_000  # of compiled template that are run; the longest conversations take a tenth
MAX_CPU_S = 5.0
MAX_TEXT = 2**23  # characters of one text: more than any context holds
MAX_TOTAL = 2**27  # characters of all texts that are made on the way
MAX_ITEMS = 100_000  # of a list or a range
MAX_BITS = 256  # of an integer
MAX_INDENT = 16

FILTERS = frozenset(
    (
        "abs",
        "batch",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "float",
        "int",
        "items",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "sort",
        "title",
        "trim",
        "unique",
        "upper",
        "wordcount",
    )
)
TEXT_METHODS = frozenset(
    (
        "capitalize",
        "count",
        "endswith",
        "find",
        "index",
        "isalnum",
        "isalpha",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "title",
        "upper",
    )
)
OTHER_METHODS = frozenset(("get", "items", "keys", "values", "index", "count"))
DATE = re.compile(r"(?:%[aAbBdeHIjmMpSyYZ%-]|[^%]){0,100}")


class TemplateLimit(TemplateError):
    """The template wanted more than it may have."""


class TemplateRaised(TemplateError):
    """The template refused the conversation, in words of its own."""


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; here it only gives what is inside."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Generator(CodeGenerator):
    """Sends `a ~ b` through the environment, which bounds what comes of it."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for argument in node.nodes:
            self.write("environment.text(")
            self.visit(argument, frame)
            self.write("), ")
        self.write("))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """See the module."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while it is compiled
            extensions=[_Generation, loopcontrols],
            cache_size=0,
        )
        self._left = 0
        self.concat = self._concat  # type: ignore[method-assign]
        self.finalize = self._finalized
        self.filters = {name: self._bounded(self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = self._to_json
        self.filters["string"] = self.text
        self.filters["join"] = self._join
        self.filters["replace"] = lambda text, *rest: self._replace(self.text(text), *rest)
        self.globals = {
            "range": _range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Bound what templates of this environment do inside the block, in this thread."""
        self._left = MAX_TOTAL
        lines, end = 0, time.thread_time() + MAX_CPU_S

        def each_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            if lines > MAX_LINES or (lines % 64 == 0 and time.thread_time() > end):
                raise TemplateLimit("it runs for too long")
            return each_line

        def each_call(frame: FrameType, event: str, argument: Any) -> Any:
            if frame.f_code.co_filename == "<template>":
                return each_line(frame, event, argument)
            return None

        before = sys.gettrace()
        sys.settrace(each_call)
        try:
            yield
        finally:
            sys.settrace(before)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of methods, those on the lists; of everything else, what Jinja's sandbox allows."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, str):
            return attr in TEXT_METHODS
        return attr in OTHER_METHODS if isinstance(obj, dict | list | tuple) else True

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        """Call what a template calls."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *arguments, **named)
        if isinstance(owner, str) and name == "join":
            return self._join(arguments[0], owner)
        return self._checked(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic of numbers; of texts and lists, only that they are put together."""
        if isinstance(left, int | float) and isinstance(right, int | float):
            if operator == "**" and not abs(right) <= MAX_BITS:
                raise TemplateLimit("it computes a large power")
            result = super().call_binop(context, operator, left, right)
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise TemplateLimit("it computes a large number")
            return result
        if operator != "+":
            raise SecurityError(f"{operator} of texts or lists")
        if isinstance(left, str) and isinstance(right, str):
            self._charge(len(left) + len(right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            if len(left) + len(right) > MAX_ITEMS:
                raise TemplateLimit("it makes a long list")
            self._charge(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def text(self, value: Any) -> str:
        """What a value looks like in a text."""
        if not isinstance(value, str):
            self._charge(_size(value))
        return str(value)

    def _finalized(self, value: Any) -> Any:
        return value if isinstance(value, str) else self.text(value)

    def _join(self, values: Any, between: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            raise SecurityError("join with an attribute")
        parts = [self.text(value) for value in values]
        self._charge(sum(map(len, parts)) + len(between) * len(parts))
        return between.join(parts)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers does it: without the escapes that HTML needs."""
        if indent is not None and not 0 <= indent <= MAX_INDENT:
            raise TemplateLimit("it indents too far")
        if separators is not None and sum(map(len, separators)) > MAX_INDENT:
            raise TemplateLimit("its separators are long")
        self._charge(_size(value))
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _concat(self, parts: Any) -> str:
        parts = list(parts)
        self._charge(sum(map(len, parts)))
        return "".join(parts)

    def _replace(self, text: str, old: object, new: object, count: int = -1) -> str:
        found = text.count(str(old))
        self._charge(len(text) + found * len(str(new)))
        return text.replace(str(old), str(new), -1 if count is None else count)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose results are counted; what tells Jinja how to call it is kept."""

        def bounded(*arguments: Any, **named: Any) -> Any:
            return self._checked(function(*arguments, **named))

        for name, value in getattr(function, "__dict__", {}).items():
            if name.startswith("jinja_"):
                setattr(bounded, name, value)
        return bounded

    def _checked(self, result: Any) -> Any:
        if isinstance(result, str):
            self._charge(len(result))
        elif isinstance(result, list | tuple) and len(result) > MAX_ITEMS:
            raise TemplateLimit("it makes a long list")
        return result

    def _charge(self, characters: int) -> None:
        self._left -= characters
        if characters > MAX_TEXT or self._left < 0:
            raise TemplateLimit("it makes a long text")


def _range(*arguments: int) -> range:
    found = range(*arguments)
    if len(found) > MAX_ITEMS:
        raise TemplateLimit("it counts too far")
    return found


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRaised(str(message))


def _strftime_now(form: str) -> str:
    if not DATE.fullmatch(form):
        raise SecurityError("a date in a form that is not known")
    return datetime.now().strftime(form)


def _size(value: Any, depth: int = 0) -> int:
    """About how many characters a value has as text; it stops where that is more than allowed."""
    if depth > 40:
        raise TemplateLimit("it nests values too deep")
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, dict):
        value = [each for pair in value.items() for each in pair]
    total = 16
    if isinstance(value, list | tuple | set | frozenset):
        for each in value:
            total += _size(each, depth + 1)
            if total > MAX_TEXT:
                raise TemplateLimit("it makes a long text")
    return total
