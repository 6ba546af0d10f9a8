"""Llama 3.1 and 3.2: the whole answer is one call, perhaps after a token.

    {"name": "add", "parameters": {"a": 1}}

Its templates refuse messages with several calls.
"""

from tsqp.serve.tools.parser import Frame
from tsqp.serve.tools.style import ToolStyle

LLAMA3 = ToolStyle(
    name="llama3_json",
    is_in=lambda source: "<|start_header_id|>" in source and '"parameters": ' in source,
    frame=Frame(("<|python_tag|>",), may_begin_bare=True),
    arguments_key="parameters",
    may_call_several=False,
)
