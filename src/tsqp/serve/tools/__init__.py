"""Tool calls and response formats: grammars that models follow, and parsers of what they write."""

from tsqp.serve.tools.parser import Delta, ToolParser
from tsqp.serve.tools.response_format import structured_outputs_of
from tsqp.serve.tools.style import ToolStyle
from tsqp.serve.tools.styles import tool_style

__all__ = ["Delta", "ToolParser", "ToolStyle", "structured_outputs_of", "tool_style"]
