"""Chat templates with tool calls, one for each style, as short as they can be."""

# ruff: noqa: E501

from chat_styles import LLAMA, QWEN

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}\
{% if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}\
{{ '[INST] ' + message.content + '[/INST]' }}{% elif message.tool_calls is defined %}\
{{ '[TOOL_CALLS] [' }}{% for tool_call in message.tool_calls %}\
{% set out = tool_call.function | tojson %}{{ out[:-1] }}{{ ', "id": "' + tool_call.id + '"}' }}\
{% if not loop.last %}{{ ', ' }}{% else %}{{ ']' + eos_token }}{% endif %}{% endfor %}\
{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% else %}\
{{ '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"""

PHI4 = """{% if tools %}{{ '<|system|>' }}{% for tool in tools %}{{ '<|tool|>' + (tool.function | tojson) + '<|/tool|>' }}\
{% endfor %}{{ '<|end|>' }}{% endif %}{% for message in messages %}{{ '<|' + message.role + '|>' }}\
{% if message.content %}{{ message.content }}{% endif %}{% for tool_call in message.tool_calls or [] %}\
{{ '<|tool_call|>' + (tool_call.function | tojson) + '<|/tool_call|>' }}{% endfor %}{{ '<|end|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

GRANITE = """{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson) + '<|end_of_text|>\\n' }}{% endif %}\
{% for message in messages %}{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + (message.content or '') }}\
{% if message.tool_calls %}{{ '<|tool_call|>[' }}{% for tool_call in message.tool_calls %}\
{{ tool_call.function | tojson }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' }}{% endif %}\
{{ '<|end_of_text|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

# For each style: the template, what stands before the assistant's text, and what ends it.
TEMPLATES = {
    "hermes": (QWEN, "<|im_start|>assistant\n", "<|im_end|>"),
    "llama3_json": (LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": (MISTRAL, "[/INST]", "</s>"),
    "granite": (GRANITE, "<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"),
    "phi4_mini_json": (PHI4, "<|assistant|>", "<|end|>"),
}
# A token of each style's opening and closing, where the family has them.
SPECIAL = ["[TOOL_CALLS]", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>"]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": -99, "maximum": 99},
                    "note": {"type": "string", "maxLength": 12},
                },
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "find_place",
            "strict": True,
            "parameters": {
                "properties": {"place": {"$ref": "#/$defs/place"}},
                "required": ["place"],
                "additionalProperties": False,
                "$defs": {"place": {"enum": ["Zürich", "東京", 'the "sea"']}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
