"""Runs the syntax tree of a chat template.

Jinja compiles a template to Python, and its work cannot be limited then: a single comparison of two
nested lists can take years. Here each step of a template is a step of this file and is paid for
before it is taken. A template can only do what is implemented here.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext

from tsqp.tee.text.origin import Text, cut
from tsqp.tee.text.template_functions import FUNCTIONS
from tsqp.tee.text.template_operations import Operations
from tsqp.tee.text.template_values import (
    Allowance,
    Fields,
    Macro,
    Namespace,
    NotAllowed,
    Stopped,
    fail_if_missing,
    missing,
    weigh,
)

MAX_NESTING = 200  # nesting of the template's syntax, and of calls of its macros


class Scope:
    """The variables of a part of a template, inside those of the part around it."""

    def __init__(self, outer: "Scope | None", names: dict[str, Any] | None = None) -> None:
        self.names = {} if names is None else names
        self._outer = outer

    def get(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope._outer
        return missing(name)


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Run(Operations):
    """One rendering; see `Operations`."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__(allowance)
        self._nesting = 0

    def render(self, tree: nodes.Template, values: Mapping[str, Any]) -> Text:
        """The text that a template writes for the given values."""
        outermost = Scope(None, {**FUNCTIONS, **values})
        return self._written(tree.body, Scope(outermost))

    # Statements: each writes to `out`.

    def _written(self, body: list[nodes.Node], scope: Scope) -> Text:
        """The output of a body, as one text."""
        out: list[str] = []
        self._body(body, scope, out)
        return self.allowance.concat(out)

    def _body(self, body: list[nodes.Node], scope: Scope, out: list[str]) -> None:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise Stopped("is nested too deep")
        for node in body:
            self.allowance.spend(1)
            run = _STATEMENTS.get(type(node))
            if run is None:
                raise NotAllowed(f"the statement {type(node).__name__.lower()!r}")
            run(self, node, scope, out)
        self._nesting -= 1

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for each in node.nodes:
            text = self.text(self._value(each, scope))
            self.allowance.spend(weigh(text))
            out.append(text)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        if node.recursive:
            raise NotAllowed("recursive loops")
        values = self.allowance.iterate(self._value(node.iter, scope))
        if node.test is not None:
            condition = node.test

            def passes(value: Any) -> bool:
                inner = Scope(scope)
                self._assign(node.target, value, inner)
                return bool(self._value(condition, inner))

            values = (value for value in values if passes(value))
        loop = LoopContext(values, lambda _: missing())  # type: ignore[arg-type]
        nesting = self._nesting
        for value, _ in loop:
            inner = Scope(scope, {"loop": loop})
            self._assign(node.target, value, inner)
            try:
                self._body(node.body, inner, out)
            except _Continue:
                self._nesting = nesting
            except _Break:
                self._nesting = nesting
                return
        if loop.index0 < 0:
            self._body(node.else_, Scope(scope), out)

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in chain((node,), node.elif_):
            if self._value(branch.test, scope):
                self._body(branch.body, scope, out)
                return
        self._body(node.else_, scope, out)

    def _set(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        self._assign(node.target, self._value(node.node, scope), scope)

    def _set_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        text: Any = self._written(node.body, Scope(scope))
        if node.filter is not None:
            text = self._filtered(node.filter, scope, text)
        self._assign(node.target, text, scope)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        text = self._written(node.body, Scope(scope))
        out.append(self.text(self._filtered(node.filter, scope, text)))

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope)
        values = [self._value(each, scope) for each in node.values]
        for target, value in zip(node.targets, values, strict=True):
            self._assign(target, value, inner)
        self._body(node.body, inner, out)

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope.names[node.name] = self._bound(node, scope)

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        out.append(self.text(self._call(node.call, scope, {"caller": self._bound(node, scope)})))

    def _scope(self, node: nodes.Scope, scope: Scope, out: list[str]) -> None:
        self._body(node.body, Scope(scope), out)

    def _break(self, node: nodes.Break, scope: Scope, out: list[str]) -> None:
        raise _Break

    def _continue(self, node: nodes.Continue, scope: Scope, out: list[str]) -> None:
        raise _Continue

    def _assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.names[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = scope.get(target.name)
            if not isinstance(space, Namespace):
                raise TypeError
            space.set(target.attr, value)
        elif isinstance(target, nodes.Tuple):
            values = list(self.allowance.iterate(value))
            for each, part in zip(target.items, values, strict=True):
                self._assign(each, part, scope)
        else:
            raise NotAllowed("such an assignment")

    # Expressions.

    def _value(self, node: nodes.Node, scope: Scope) -> Any:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise Stopped("is nested too deep")
        self.allowance.spend(1)
        evaluate = _EXPRESSIONS.get(type(node))
        if evaluate is None:
            raise NotAllowed(f"the expression {type(node).__name__.lower()!r}")
        value = evaluate(self, node, scope)
        self._nesting -= 1
        return value

    def _values(self, each: Iterable[nodes.Node], scope: Scope) -> list[Any]:
        return [self._value(node, scope) for node in each]

    def _attribute(self, node: nodes.Getattr, scope: Scope) -> Any:
        return self.attribute(self._value(node.node, scope), node.attr)

    def _item(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self._value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            return self._slice(value, node.arg, scope)
        name = node.arg.value if isinstance(node.arg, nodes.Const) else ""
        return self.item(
            value, self._value(node.arg, scope), name if name and isinstance(name, str) else ""
        )

    def _slice(self, value: Any, node: nodes.Slice, scope: Scope) -> Any:
        ends = (node.start, node.stop, node.step)
        where = slice(*(None if end is None else self._value(end, scope) for end in ends))
        fail_if_missing(value, where.start, where.stop, where.step)
        if isinstance(value, str):
            return self.allowance.text(cut(value, where))
        if isinstance(value, range):
            return value[where]
        if isinstance(value, tuple):
            return self.allowance.row(value[where])
        if isinstance(value, list):
            return self.allowance.items(value[where])
        raise TypeError

    def _call(self, node: nodes.Call, scope: Scope, extra: Mapping[str, Any] | None = None) -> Any:
        function = self._value(node.node, scope)
        arguments, named = self._arguments(node, scope)
        return self.call(function, arguments, {**named, **(extra or {})})

    def _bound(self, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> Macro:
        """A macro, with the variables that are around it."""
        self.allowance.spend(len(node.args))
        parameters = [each.name for each in node.args]
        defaults = dict(zip(parameters[::-1], node.defaults[::-1], strict=False))

        def call(arguments: list[Any], named: dict[str, Any]) -> Text:
            self.allowance.spend(len(parameters))
            inner = Scope(scope)
            if "caller" in named:
                inner.names["caller"] = named.pop("caller")
            given = dict(zip(parameters, arguments, strict=False)) | named
            if len(given) < len(arguments) + len(named) or not given.keys() <= set(parameters):
                raise TypeError  # too many, or one twice, or one that there is not
            for name in parameters:
                if name in given:
                    inner.names[name] = given[name]
                elif name in defaults:
                    inner.names[name] = self._value(defaults[name], inner)
                else:
                    inner.names[name] = missing(name)
            return self._written(node.body, inner)

        return Macro(call)

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[Any], dict[str, Any]]:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise NotAllowed("arguments with * or **")
        named = {str(each.key): self._value(each.value, scope) for each in node.kwargs}
        return self._values(node.args, scope), named

    def _filtered(self, node: nodes.Filter, scope: Scope, text: Any) -> Any:
        """Apply a filter; one without a value of its own, in a block, to `text`."""
        if node.node is None:
            value = text
        elif text is not None and isinstance(node.node, nodes.Filter):
            value = self._filtered(node.node, scope, text)
        else:
            value = self._value(node.node, scope)
        arguments, named = self._arguments(node, scope)
        return self.filter(node.name, value, arguments, named)

    def _test(self, node: nodes.Test, scope: Scope) -> Any:
        value = self._value(node.node, scope)
        arguments, named = self._arguments(node, scope)
        return self.test(node.name, value, arguments, named)

    def _comparison(self, node: nodes.Compare, scope: Scope) -> bool:
        left = self._value(node.expr, scope)
        for operand in node.ops:
            right = self._value(operand.expr, scope)
            if not self.compare(operand.op, left, right):
                return False
            left = right
        return True

    def _and(self, node: nodes.And, scope: Scope) -> Any:
        return self._value(node.left, scope) and self._value(node.right, scope)

    def _or(self, node: nodes.Or, scope: Scope) -> Any:
        return self._value(node.left, scope) or self._value(node.right, scope)

    def _choice(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self._value(node.test, scope):
            return self._value(node.expr1, scope)
        return missing() if node.expr2 is None else self._value(node.expr2, scope)

    def _dict(self, node: nodes.Dict, scope: Scope) -> Fields:
        pairs = [(self._value(p.key, scope), self._value(p.value, scope)) for p in node.items]
        return self.allowance.fields(pairs)

    def _concat(self, node: nodes.Concat, scope: Scope) -> Text:
        return self.allowance.concat([self.text(each) for each in self._values(node.nodes, scope)])


def _binary(compute: Callable[[Run, Any, Any], Any]) -> Callable[..., Any]:
    def evaluate(run: Run, node: nodes.BinExpr, scope: Scope) -> Any:
        return compute(run, run._value(node.left, scope), run._value(node.right, scope))

    return evaluate


_STATEMENTS: dict[type[nodes.Node], Callable[..., None]] = {
    nodes.Output: Run._output,
    nodes.For: Run._for,
    nodes.If: Run._if,
    nodes.Assign: Run._set,
    nodes.AssignBlock: Run._set_block,
    nodes.FilterBlock: Run._filter_block,
    nodes.With: Run._with,
    nodes.Macro: Run._macro,
    nodes.CallBlock: Run._call_block,
    nodes.Scope: Run._scope,
    nodes.Break: Run._break,
    nodes.Continue: Run._continue,
}
_EXPRESSIONS: dict[type[nodes.Node], Callable[..., Any]] = {
    nodes.Const: lambda run, node, scope: node.value,
    nodes.TemplateData: lambda run, node, scope: node.data,
    nodes.Name: lambda run, node, scope: scope.get(node.name),
    nodes.Getattr: Run._attribute,
    nodes.Getitem: Run._item,
    nodes.Call: Run._call,
    nodes.Filter: lambda run, node, scope: run._filtered(node, scope, None),
    nodes.Test: Run._test,
    nodes.Compare: Run._comparison,
    nodes.And: Run._and,
    nodes.Or: Run._or,
    nodes.Not: lambda run, node, scope: not run._value(node.node, scope),
    nodes.CondExpr: Run._choice,
    nodes.List: lambda run, node, scope: run.allowance.items(run._values(node.items, scope)),
    nodes.Tuple: lambda run, node, scope: run.allowance.row(run._values(node.items, scope)),
    nodes.Dict: Run._dict,
    nodes.Concat: Run._concat,
    nodes.Add: _binary(Run.add),
    nodes.Sub: _binary(Run.subtract),
    nodes.Mul: _binary(Run.multiply),
    nodes.Div: _binary(Run.divide),
    nodes.FloorDiv: _binary(Run.divide_down),
    nodes.Mod: _binary(Run.modulo),
    nodes.Pow: _binary(Run.power),
    nodes.Neg: lambda run, node, scope: run.subtract(0, run._value(node.node, scope)),
    nodes.Pos: lambda run, node, scope: run.add(0, run._value(node.node, scope)),
}
