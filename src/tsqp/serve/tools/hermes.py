"""Hermes, Qwen 2.5 and 3, SmolLM3, and Granite 4: each call in its own tags.

<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>
"""

from tsqp.serve.tools.parser import Frame
from tsqp.serve.tools.style import ToolStyle

HERMES = ToolStyle(
    name="hermes",
    is_in=lambda source: "<tool_call>" in source,
    frame=Frame(("<tool_call>",), "</tool_call>"),
    inside="\n",
    between="\n",
)
