"""A model's chat template: a conversation becomes one text.

The template is a program of the model's author. It runs in a sandbox with limits, and what it
raises is told without the words of the conversation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError

from tsqp.errors import PromptError, TokenizerError
from tsqp.tee.text.template_sandbox import TemplateEnvironment, TemplateLimit, TemplateRaised

MAX_SOURCE = 2**20  # characters; the longest that is known has 20,000
DEFAULT = "default"
WITH_TOOLS = "tool_use"


class ChatTemplate:
    """One template, or several by name.

    Args:
        source: in Jinja; of several, "tool_use" is taken where there are tools, and "default" else.
        special_tokens: texts of "bos_token", "eos_token" and so on, which templates name.

    Raises:
        TokenizerError: there is no default, or it is not Jinja, or too long.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._environment = TemplateEnvironment()
        self._special_tokens = dict(special_tokens)
        sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        if DEFAULT not in sources:
            raise TokenizerError(
                "The model has several chat templates, and none is the default: "
                f"{', '.join(sorted(sources))[:200]!a}."
            )
        wanted = [name for name in (DEFAULT, WITH_TOOLS) if name in sources]
        self._compiled = {name: self._compile(sources[name]) for name in wanted}
        self._takes_parts = {name: _reads_parts(self._tree(sources[name])) for name in wanted}
        self._sentences = {name: _constants(self._tree(sources[name])) for name in wanted}
        self.sources = {name: sources[name] for name in wanted}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **named: Any,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` gives it.

        Args:
            messages: as `check_messages` returns them.
            tools: what the model may call, as JSON schemas.
            add_generation_prompt: whether the text ends where an answer begins.
            named: further values that the template may ask for.

        Raises:
            PromptError: the template refuses the conversation.
            TokenizerError: the template does something that it may not do, or fails.
        """
        name = WITH_TOOLS if tools and WITH_TOOLS in self._compiled else DEFAULT
        given = messages if self._takes_parts[name] else [_with_text(each) for each in messages]
        values: dict[str, Any] = {"documents": None, **self._special_tokens, **named}
        values |= {"messages": list(given), "tools": list(tools) if tools else None}
        values["add_generation_prompt"] = add_generation_prompt
        failure: Exception
        try:
            with self._environment.limits():
                return self._compiled[name].render(values)
        except TemplateRaised as exc:
            failure = self._refusal(str(exc), name)
        except TemplateLimit as exc:
            failure = TokenizerError(f"The model's chat template was stopped: {exc}.")
        except SecurityError:
            failure = TokenizerError(
                "The model's chat template does something that templates may not do here."
            )
        except Exception as exc:  # whatever a program of the model's author runs into
            failure = PromptError(
                "The model's chat template does not accept this conversation: check the roles, "
                f"their order, and what each message has ({type(exc).__name__})."
            )
        raise failure  # outside, as the causes may quote the conversation

    def _refusal(self, message: str, name: str) -> PromptError:
        """What the template said, where it is a sentence of its source, without words of others."""
        if message in self._sentences[name]:
            return PromptError(f"The model's chat template refuses the conversation: {message}")
        return PromptError(
            "The model's chat template refuses the conversation: check the roles and their order."
        )

    def _compile(self, source: str) -> Template:
        if len(source) > MAX_SOURCE:
            raise TokenizerError(
                f"The model's chat template is longer than {MAX_SOURCE} characters."
            )
        try:
            return self._environment.from_string(source)
        except TemplateSyntaxError as exc:
            reason = f"{exc.message} in line {exc.lineno}"
        except Exception as exc:  # deep nesting, and whatever else the compiler does not expect
            reason = type(exc).__name__
        raise TokenizerError(f"The model's chat template cannot be used ({reason}).")

    def _tree(self, source: str) -> nodes.Template:
        return self._environment.parse(source)


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template goes through the parts of a content; else it wants one text."""
    return any(
        isinstance(found, nodes.Getattr | nodes.Getitem) and _key(found) == "content"
        for loop in tree.find_all(nodes.For)
        for found in (loop.iter, *loop.iter.find_all((nodes.Getattr, nodes.Getitem)))
    )


def _key(node: nodes.Getattr | nodes.Getitem) -> object:
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


def _constants(tree: nodes.Template) -> frozenset[str]:
    return frozenset(
        each.value for each in tree.find_all(nodes.Const) if isinstance(each.value, str)
    )


def _with_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its text parts as one text, a line each, as vLLM joins them."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}
