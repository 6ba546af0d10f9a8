"""Granite 3: one JSON list of calls after a token.

<|tool_call|>[{"name": "add", "arguments": {"a": 1}}, {"name": ...}]
"""

from tsqp.serve.tools.parser import Frame
from tsqp.serve.tools.style import ToolStyle

GRANITE = ToolStyle(
    name="granite",
    is_in=lambda source: "<|tool_call|>" in source and "<|/tool_call|>" not in source,
    frame=Frame(("<|tool_call|>", "<tool_call>")),
    in_list=True,
    between=", ",
)
