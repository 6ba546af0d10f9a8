"""A model's chat template: a conversation becomes one text.

The template is an unreviewed program from the model's author. Jinja parses it, and `template_run`
runs it within limits. Its errors are reported without quoting the conversation.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tsqp.errors import PromptError, TokenizerError, TSQPError
from tsqp.tee.text.content_format import reads_parts, with_text
from tsqp.tee.text.origin import Text, cut, is_written, strip, written
from tsqp.tee.text.template_run import Run
from tsqp.tee.text.template_values import (
    Allowance,
    MissingValue,
    NotAllowed,
    Refused,
    Stopped,
    adopt,
    adopt_conversation,
    weigh,
)

MAX_SOURCE = 2**17  # characters; the longest that is known has 20,000
MAX_SENTENCE = 300  # characters of a template's own message that are shown
DEFAULT = "default"
WITH_TOOLS = "tool_use"
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of one field; the first one counts
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # the same as in transformers


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; here it only gives what is inside."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Parsed:
    """The syntax tree of one template, and what is known from it.

    Raises:
        TokenizerError: it is too long, or not Jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TokenizerError(
                f"The model's chat template is longer than {MAX_SOURCE} characters."
            )
        reason = ""
        try:
            self.tree = Environment(
                trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
            ).parse(source)
            self.texts = frozenset(_mark(self.tree))
            self.takes_parts = reads_parts(self.tree)
        except TemplateSyntaxError as exc:
            reason = f"{exc.message} in line {exc.lineno}"
        except Exception as exc:  # deep nesting, and whatever else the parser does not expect
            reason = type(exc).__name__
        if reason:
            raise TokenizerError(f"The model's chat template cannot be used ({reason}).")


class ChatTemplate:
    """One template, or several by name.

    Args:
        source: in Jinja. Of several, "tool_use" is taken if there are tools, or else "default".
        special_tokens: texts of "bos_token", "eos_token" and so on, which templates name.

    Raises:
        TokenizerError: there is no default, or it is not Jinja, or too long.

    Attributes:
        texts: the texts that stand in the templates: data and constants.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = {name: written(text) for name, text in special_tokens.items()}
        sources = {DEFAULT: source} if isinstance(source, str) else source
        if DEFAULT not in sources:
            raise TokenizerError(
                "The model has several chat templates, and none is the default: "
                f"{', '.join(sorted(sources))[:200]!a}."
            )
        used = [name for name in (DEFAULT, WITH_TOOLS) if name in sources]
        self._parsed = {name: _Parsed(sources[name]) for name in used}
        self.texts = frozenset().union(*(each.texts for each in self._parsed.values()))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> Text:
        """The text of a conversation, as transformers' `apply_chat_template` gives it.

        Null content reaches the template as null; other fields that are null are left out, as in
        transformers. A content of text parts is joined, a line each, for a template that does not
        go through parts.

        Args:
            messages: as `check_messages` returns them.
            tools: what the model may call, as JSON schemas, as `check_tools` returns them.
            add_generation_prompt: whether the text ends where an answer begins.
            continue_final_message: whether the text ends where the content of the last message
                does, for the model to continue it; not with `add_generation_prompt`.
            template_kwargs: further values for the template, plain as those of messages.

        Raises:
            PromptError: the template refuses the conversation, or cannot use it.
            TokenizerError: the template does something forbidden, or exceeds its limits.
        """
        wants_tools = tools is not None and WITH_TOOLS in self._parsed
        parsed = self._parsed[WITH_TOOLS if wants_tools else DEFAULT]
        conversation = [_fields(message) for message in messages]
        if not parsed.takes_parts:
            conversation = [with_text(message) for message in conversation]
        end = ""
        if continue_final_message:
            if add_generation_prompt:
                raise PromptError("Continue the last message or begin an answer, but not both.")
            end = _tag_end(conversation)
        values = {
            **self._special_tokens,
            "documents": None,
            **adopt(template_kwargs),
            "messages": adopt_conversation(conversation),
            "tools": adopt(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        text = _run(parsed, values)
        return _up_to_tag(text, end) if continue_final_message else text


def _run(parsed: _Parsed, values: Mapping[str, Any]) -> Text:
    failure: TSQPError
    try:
        allowance = Allowance(sum(map(weigh, values.values())))
        return Run(allowance).render(parsed.tree, values)
    except Refused as exc:
        failure = PromptError(_refusal(exc.sentence, parsed.texts))
    except Stopped as exc:
        failure = TokenizerError(f"The model's chat template was stopped: it {exc}.")
    except NotAllowed as exc:
        failure = TokenizerError(f"The model's chat template uses {exc}, which TSQP does not run.")
    except MissingValue as exc:
        failure = _not_accepted(values["messages"], str(exc))
    except RecursionError:
        failure = TokenizerError("The model's chat template was stopped: it is nested too deep.")
    except Exception:  # Python raises these for values of unsuitable types
        failure = _not_accepted(values["messages"])
    raise failure  # outside, as what the template raised may quote the conversation


def _not_accepted(messages: Sequence[Mapping[str, Any]], needed: str = "") -> PromptError:
    """The error for messages that a template fails on; `needed` is a name from the template."""
    without = [n for n, each in enumerate(messages, 1) if each.get("content") is None]
    reason = "check their roles, their order, and what each of them has"
    if without:
        reason = f"message {without[0]} has no content, which this template may need"
    elif needed:
        reason = f"it needs {needed!r}, which they do not have"
    return PromptError(f"The model's chat template does not accept these messages: {reason}.")


def _refusal(sentence: object, texts: Set[str]) -> str:
    """The template's message, if it is a constant in its source.

    Any other message could quote the conversation.
    """
    refused = "The model's chat template refuses these messages"
    if isinstance(sentence, str) and is_written(sentence) and sentence in texts:
        shown = "".join(each if each.isprintable() else " " for each in sentence[:MAX_SENTENCE])
        return f"{refused}: {shown}"
    return f"{refused}: check their roles and their order."


def _fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message, with its reasoning under each name that templates use for it."""
    found = {
        name: value for name, value in message.items() if value is not None or name == "content"
    }
    reasoning = next((found[name] for name in REASONING if name in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _tag_end(conversation: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text, and return that text."""
    last = conversation[-1] if conversation else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _TAG
        return content
    parts = [dict(part) for part in content] if isinstance(content, list) else []
    if not parts:
        raise PromptError("There is no text to continue: the last message has none.")
    last["content"] = parts
    text: str = parts[-1]["text"]
    parts[-1]["text"] = text + _TAG
    return text


def _up_to_tag(text: Text, end: str) -> Text:
    place = text.rfind(_TAG.strip())
    if place < 0 or end.strip() not in text:
        raise PromptError(
            "The model's chat template changes the last message, so it cannot be continued."
        )
    before = cut(text, slice(0, place))
    # A template that trims messages has trimmed the end of the tag: then it would trim this end.
    return before if text.startswith(_TAG, place) else strip(before, None, left=False)


def _mark(tree: nodes.Template) -> Iterator[str]:
    """Mark every text of a template as its own, and give them all."""
    waiting: list[nodes.Node] = [tree]
    while waiting:
        node = waiting.pop()
        waiting.extend(node.iter_child_nodes())
        if isinstance(node, nodes.TemplateData):
            node.data = written(node.data)
            yield node.data
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            node.value = written(node.value)
            yield node.value
        elif isinstance(node, nodes.Const) and isinstance(node.value, int):
            Allowance(0).number(node.value)
