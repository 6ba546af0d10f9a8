"""Which style of tool calls a model has."""

from collections.abc import Mapping

from tsqp.errors import UsageError
from tsqp.serve.tools.granite import GRANITE
from tsqp.serve.tools.hermes import HERMES
from tsqp.serve.tools.llama3 import LLAMA3
from tsqp.serve.tools.mistral import MISTRAL
from tsqp.serve.tools.phi4 import PHI4
from tsqp.serve.tools.style import ToolStyle
from tsqp.tee.text.chat_template import DEFAULT, WITH_TOOLS

STYLES = {style.name: style for style in (MISTRAL, PHI4, GRANITE, HERMES, LLAMA3)}


def tool_style(
    chat_template_source: str | Mapping[str, str] | None, name: str | None = None
) -> ToolStyle | None:
    """The style in which a chat template writes tool calls.

    Args:
        chat_template_source: in Jinja; of several templates, the one for tools counts.
        name: take the style of this name, whatever the template is.

    Returns:
        None if the template has no tool calls, or none in a style that is known.

    Raises:
        UsageError: there is no style of this name.
    """
    if name is not None:
        if name not in STYLES:
            raise UsageError(f"There is no such tool call parser: use {', '.join(sorted(STYLES))}.")
        return STYLES[name]
    source = chat_template_source
    if isinstance(source, Mapping):
        source = source.get(WITH_TOOLS, source.get(DEFAULT))
    return next((style for style in STYLES.values() if style.is_in(source or "")), None)
