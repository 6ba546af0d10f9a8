"""What an answer may be: any text, a text of some form, or tool calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsqp.errors import PromptError
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.serve.errors import as_api_error, bad_request
from tsqp.serve.tools import ToolParser, ToolStyle, structured_outputs_of
from tsqp.serve.tools.response_format import (
    ResponseFormat,
    StructuredOutputsField,
    inline_format,
)
from tsqp.tee.structured_outputs import StructuredOutputsParams

Objects = Sequence[Mapping[str, Any]]


class _Tools(StructuredOutputsParams):
    """Structured outputs that messages call `tools`."""

    label = "tools"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be.

    Attributes:
        structured_outputs: holds the sampler to it; None for any text.
        tools: for the chat template, in OpenAI's form; None if it gets none.
        style: how calls are written; None if the answer cannot have any.
    """

    structured_outputs: StructuredOutputsParams | None = None
    tools: Objects | None = None
    style: ToolStyle | None = None

    def parser(self) -> ToolParser | None:
        """Finds the calls in one answer; None if it cannot have any."""
        return None if self.style is None else self.style.parser(self.tools or ())

    @property
    def fields(self) -> dict[str, Any]:
        """The sampling parameters that make answers have this form."""
        if self.structured_outputs is None:
            return {}
        # Tags around calls may be special tokens, and the parser has to see them.
        shown = {} if self.style is None else {"skip_special_tokens": False}
        return {"structured_outputs": self.structured_outputs, **shown}


ANY_TEXT = AnswerForm()


def text_form(
    response_format: Mapping[str, Any] | None,
    kind: type[StructuredOutputsParams] = ResponseFormat,
    outputs: Mapping[str, Any] | None = None,
) -> AnswerForm:
    """The form of an answer without tools.

    Args:
        kind: has the name of the field, for messages.
        outputs: vLLM's `structured_outputs`, instead of a format.

    Raises:
        APIError: the format is wrong, or there are two.
    """
    if outputs is not None:
        if response_format is not None:
            raise bad_request(
                "Give either response_format or structured_outputs.", StructuredOutputsField.label
            )
        kind = StructuredOutputsField
    try:
        if outputs is not None:
            return AnswerForm(StructuredOutputsField(**outputs))
        return AnswerForm(structured_outputs_of(response_format, kind))
    except PromptError as error:
        raise as_api_error(error, kind.label) from None


def answer_form(
    llm: AsyncLLM,
    style: ToolStyle | None,
    response_format: Mapping[str, Any] | None,
    tools: Objects | None,
    choice: str | Mapping[str, Any] | None,
    *,
    parallel: bool | None,
    kind: type[StructuredOutputsParams] = ResponseFormat,
    outputs: Mapping[str, Any] | None = None,
) -> AnswerForm:
    """The form of an answer that may call tools. This takes a while if there are many.

    With "auto", an answer is a call or has the response format. Calls that must be made leave no
    room for a response format, so it does not count then.

    Args:
        style: how the model writes calls; None if that is not known.
        tools, choice, parallel: `tools`, `tool_choice` and `parallel_tool_calls` in OpenAI's form.
        kind, outputs: see `text_form`.

    Raises:
        APIError: the format, the tools or the choice are wrong, or the model cannot call tools.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice is only allowed with tools.", "tool_choice")
        return text_form(response_format, kind, outputs)
    if outputs is not None and choice != "none":
        raise bad_request(
            "structured_outputs and tools cannot be used together: leave one of them out, or set "
            "tool_choice to none.",
            StructuredOutputsField.label,
        )
    if style is None:
        if choice == "none":
            return text_form(response_format, kind, outputs)
        raise bad_request(
            "The chat template of this model has no tool calls in a style that this server knows: "
            "leave tools out, set tool_choice to none, or start the server with "
            "--tool-call-parser.",
            "tools",
        )
    if choice == "none" and (form := text_form(response_format, kind, outputs)).structured_outputs:
        return AnswerForm(form.structured_outputs, tools)
    try:
        grammar = style.grammar(
            tools,
            choice or "auto",
            parallel=parallel is not False,
            special=llm.special_ids,
            form=inline_format(response_format, kind),
        )
        return AnswerForm(_Tools(grammar=grammar), tools, None if choice == "none" else style)
    except PromptError as error:
        raise as_api_error(error, "tools") from None
