# ruff: noqa: E501
"""A template that shows tools, an answer that calls them, and how the double is made to give one."""

from __future__ import annotations

from support.doubles.server import LiveServer

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n{{ lead or '' }}{# </think> #}"
)
CALLS = (
    '<think>\nWhere? Oslo.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo 😀"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


def script(server: LiveServer, text: str) -> None:
    """What the model says next; it ends its turn after that."""
    eos = server.tokenizer.eos_token_id
    assert eos is not None
    server.engine.answer = [*server.tokenizer.encode(text, add_special_tokens=False), eos]
