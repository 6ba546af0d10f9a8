"""How a family of chat templates writes tool calls: their grammar and their parser."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsqp.errors import PromptError
from tsqp.serve.tools.parser import Frame, ToolParser
from tsqp.tee.structured_outputs import inline_schema

MAX_TOOLS = 128  # as in OpenAI's API
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_SPECIAL: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """One way to write tool calls.

    Attributes:
        name: vLLM's name of the parser.
        is_in: whether a chat template, given as source, writes calls in this way.
        frame: what stands around the calls, for the parser. Models write the first opening.
        inside: whitespace on the inner sides of opening and closing.
        in_list: the calls are a JSON list; otherwise each call has an opening of its own.
        between: what stands between two calls; without a list, it may be left out.
        arguments_key: the key of the arguments.
        may_call_several: whether an answer may have more than one call.
    """

    name: str
    is_in: Callable[[str], bool]
    frame: Frame
    inside: str = ""
    in_list: bool = False
    between: str = ""
    arguments_key: str = "arguments"
    may_call_several: bool = True

    def parser(self, tools: Sequence[Mapping[str, Any]]) -> ToolParser:
        """A parser for one answer. See `grammar` for the tools."""
        return ToolParser(self.frame, {name for name, _ in _functions(tools)})

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str | Mapping[str, Any] = "auto",
        parallel: bool = True,
        special: Mapping[str, int] = _NO_SPECIAL,
        form: str = "",
    ) -> str:
        """A grammar in Lark's syntax for an answer that may, must or must not call tools.

        Args:
            tools: in OpenAI's form, `{"type": "function", "function": {"name", "parameters"}}`.
            choice: OpenAI's `tool_choice`. With "auto", any text may stand before the first call,
                or instead of calls. With "required", the answer is calls only. With one tool, it is
                one call of this tool. With "none", it has no call.
            parallel: whether there may be several calls. Some styles never have several.
            special: the id of each special token (`Tokenizer.special_ids`): an opening that is such
                a token is matched as one. The text of the answer must then have the special tokens.
            form: a part of a grammar: what an answer of "auto" is that calls nothing, instead of
                any text.

        Raises:
            PromptError: the tools, or the choice, are not valid.
        """
        functions = _chosen(_functions(tools), choice)
        opening = self.frame.openings[0]
        token = f"<[{special[opening]}]>" if opening in special else ""
        mark = re.escape(opening).replace("/", r"\/")
        bare = self.frame.may_begin_bare
        if bare:
            rules = [r"text: /([^\s{](?s:.*))?/"]
        elif token or choice != "none":
            rules = ["text: /(?s:.*)/"]
        else:
            rules = ["text: TEXT", rf"TEXT: /(?s:.*)/ & ~/(?s:.*){mark}(?s:.*)/"]
        if choice == "none":
            return "\n".join(["start: text", *rules])
        begin = token or _literal(opening)
        first = f"[{begin}] body" if bare else f"{begin} body"
        if choice != "auto":
            start = first
        elif form:
            start = f"form | {first}"
            rules = [f"form: {form}"]
        elif bare:
            start = f"text | {first}"
        elif token:
            start = f"text | text {begin} body"
        else:
            start = "text | lead body"
            rules.append(f"lead[lazy]: /(?s:.*){mark}/")
        several = parallel and self.may_call_several and choice in ("auto", "required")
        rules.append(f"body: {self._body(begin, several, special)}")
        names = [f"call_{number}" for number in range(len(functions))]
        rules.append(f"call: {' | '.join(names)}")
        for name, (tool, schema) in zip(names, functions, strict=True):
            head = f'{{"name": {json.dumps(tool)}, "{self.arguments_key}": '
            rules.append(f'{name}: {_literal(head)} {name}_arguments "}}"')
            rules.append(f"{name}_arguments: {schema}")
        return "\n".join([f"start: {start}", *rules])

    def _body(self, begin: str, several: bool, special: Mapping[str, int]) -> str:
        """What follows the first opening."""
        inside = f" {_literal(self.inside)}" if self.inside else ""
        closing = self.frame.closing
        end = f"<[{special[closing]}]>" if closing in special else _literal(closing)
        if not closing:
            end = ""
        if self.in_list:
            more = f" ({_literal(self.between)} call)*" if several else ""
            return f'" "? "[" call{more} "]" {end}'
        one = f"{inside} call{inside} {end}"
        between = f"{_literal(self.between)}? " if self.between else ""
        return f"{one} ({between}{begin} {one})*" if several else one


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The name of each tool, and the schema of its arguments as a part of a grammar."""
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence) or not tools:
        raise PromptError("Tools are a list of at least one function.")
    if len(tools) > MAX_TOOLS:
        raise PromptError(f"There are {len(tools)} tools, but at most {MAX_TOOLS} are allowed.")
    found = [_function(tool, f"Tool {number}") for number, tool in enumerate(tools, 1)]
    if len({name for name, _ in found}) < len(found):
        raise PromptError("Two tools have the same name.")
    return found


def _function(tool: object, place: str) -> tuple[str, str]:
    given = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(given, Mapping) or tool.get("type", "function") != "function":  # type: ignore[attr-defined]
        raise PromptError(f"{place} is not a function.")
    name, parameters = given.get("name"), given.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PromptError(
            f"{place} has no name of 1 to 64 letters, digits, underscores, dots and hyphens."
        )
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise PromptError(
            f"The parameters of {place.lower()} are not the JSON schema of an object."
        )
    schema = {**parameters, "type": "object"}
    is_strict = given.get("strict") is True
    return name, inline_schema(schema, f"The schema of {place.lower()}", lenient=not is_strict)


def _chosen(
    functions: list[tuple[str, str]], choice: str | Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The tools that may be called."""
    if choice in ("auto", "none", "required"):
        return functions
    name = None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, Mapping) else choice.get("name")
    if name is None:
        raise PromptError('tool_choice must be "auto", "none", "required", or one function.')
    chosen = [each for each in functions if each[0] == name]
    if not chosen:
        raise PromptError("tool_choice names a function that is not among the tools.")
    return chosen
