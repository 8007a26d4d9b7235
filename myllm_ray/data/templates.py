"""Chat templates in Jinja: the default one, and those that `tokenizer.chat_template` selects by name.

The answers of the assistant are inside `{% generation %}`, which determines the tokens that are trained on.
"""

from __future__ import annotations

from typing import NamedTuple

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

_CHATML = """
{%- if tools %}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
  {{- 'You may call these functions, each by a JSON object {"name": ..., "arguments": {...}} \
in <tool_call></tool_call>:\n<tools>\n' }}
  {%- for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
  {{- '</tools>' + turn_end + '\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\n' }}
    {%- generation %}
      {%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
      {{- message.content }}
      {%- for call in message.tool_calls or [] %}
        {{- ('\n' if message.content or not loop.first else '') + '<tool_call>\n' }}
        {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\n</tool_call>' }}
      {%- endfor %}
      {{- turn_end }}
    {%- endgeneration %}
    {{- '\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\n' if loop.first or messages[loop.index0 - 1].role != 'tool' else '\n' }}
    {{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
    {{- turn_end + '\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
  {%- elif not (tools and loop.first and message.role == 'system') %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + turn_end + '\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""ChatML, with reasoning, tools and tool calls in the layout of Qwen and Hermes."""
DEFAULT_CHAT_TEMPLATE = f"{{%- set turn_end = '{TURN_END}' %}}{_CHATML}"
"""The chat template for tokenizers without one."""
DEFAULT_WITHOUT_TURN_END = "{%- set turn_end = eos_token %}" + _CHATML
"""The default template for tokenizers in which `TURN_END` is not a token.

The end-of-text token ends a turn instead, because generation can stop only at a token.
"""
TRAINED = "{#- The model was trained on chats in this layout. #}"
"""Prefix of the default template in the checkpoint of a model that was trained on chats in it."""

_LLAMA3 = """
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
  {%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
_GEMMA = """
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<start_of_turn>model\n' }}
    {%- generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
  {%- elif message.role != 'system' %}
    {{- '<start_of_turn>' + message.role + '\n' + (system if loop.index0 == (1 if system else 0) else '') }}
    {{- message.content | trim + '<end_of_turn>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


class NamedTemplate(NamedTuple):
    """A chat template and the special tokens that it writes in addition to those of the tokenizer."""

    text: str
    tokens: tuple[str, ...]


NAMED = {
    "chatml": NamedTemplate("{#- chatml #}" + DEFAULT_CHAT_TEMPLATE, (TURN_START, TURN_END)),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": NamedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
}
"""The templates by name: ChatML of Qwen, the template of Llama 3 without tools, and that of Gemma 2 and 3."""
