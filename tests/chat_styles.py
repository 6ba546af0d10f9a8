"""Chat templates in the styles of the families, as short as they can be with every feature."""

# ruff: noqa: E501

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}{{- "Tools: " }}{% for t in tools %}{{- t | tojson(indent=4) }}{% endfor %}{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% set ns = namespace(index=0) %}{% for message in messages %}\
{% if message['role'] == 'user' %}{% if (ns.index % 2) != 0 %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}\
{% else %}{{ raise_exception('Only user and assistant, not ' + message['role']) }}{% endif %}\
{% set ns.index = ns.index + 1 %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == \
'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\\n' }}\
{% if message['content'] is string %}{{ message['content'] | trim }}\
{% elif message['content'] is iterable %}{% for item in message['content'] %}\
{% if item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}\
{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}\
{% endif %}"""

QWEN = """{%- for message in messages %}{%- if message.content is string %}\
{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}\
{%- if message.role == 'assistant' %}{%- set reasoning = '' %}{%- if '</think>' in content %}\
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}\
{{- '<|im_start|>assistant\\n' + content }}\
{%- for tool_call in message.tool_calls or [] %}{%- if tool_call.function %}\
{%- set tool_call = tool_call.function %}{%- endif %}\
{{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}\
{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}\
{{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}{%- endfor %}\
{{- '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}\
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}\
{%- endif %}{%- endif %}"""

PHI = """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + \
'<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}\
{{ eos_token }}{% endif %}"""

GRANITE = """{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}\
{%- set loop_messages = messages[1:] %}{%- else %}{%- set system_message = 'Knowledge Cutoff.' %}\
{%- set loop_messages = messages %}{%- endif %}\
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}\
{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}\
{{- '<|end_of_text|>\\n' }}{%- endif %}{%- for message in loop_messages %}\
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}\
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}\
{{- '<|end_of_role|>' }}{%- endif %}{%- endfor %}"""

STYLES = {
    "granite": GRANITE,
    "chatml": CHATML,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen": QWEN,
    "phi": PHI,
}
