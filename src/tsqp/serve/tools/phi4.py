"""Phi-4: each call between two tokens.

<|tool_call|>{"name": "add", "arguments": {"a": 1}}<|/tool_call|>
"""

from tsqp.serve.tools.parser import Frame
from tsqp.serve.tools.style import ToolStyle

PHI4 = ToolStyle(
    name="phi4_mini_json",
    is_in=lambda source: "<|/tool_call|>" in source,
    frame=Frame(("<|tool_call|>",), "<|/tool_call|>"),
)
