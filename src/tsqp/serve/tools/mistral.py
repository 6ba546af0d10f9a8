"""Mistral 7B v0.3 and Nemo: one JSON list of calls after a token.

    [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": ...}]

Templates add an "id" of nine characters to calls of earlier messages. Models may write one, too.
Later models, whose calls have no list (`[TOOL_CALLS]add[ARGS]{"a": 1}`), are not supported.
"""

from tsqp.serve.tools.parser import Frame
from tsqp.serve.tools.style import ToolStyle

MISTRAL = ToolStyle(
    name="mistral",
    is_in=lambda source: "[TOOL_CALLS]" in source and "[ARGS]" not in source,
    frame=Frame(("[TOOL_CALLS]",)),
    in_list=True,
    between=", ",
)
