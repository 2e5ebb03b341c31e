"""Mistral's conversations as Jinja, as mistral-common writes them: for directories with a tekken.json alone.

v7 puts a call's id into a result and calls into one list; v11 gives each call its own mark; v13 leaves ids
out and tells of tools before the first question instead of the last.
"""

from __future__ import annotations

_V7_CALLS = """
    {{- '[TOOL_CALLS][' }}
    {%- for call in m.tool_calls %}
      {{- ', ' if not loop.first }}
      {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
    {%- endfor %}
    {{- ']' }}"""
_MARKED_CALLS = """
    {%- for call in m.tool_calls %}
      {{- '[TOOL_CALLS]' + call.function.name + @ID@ + '[ARGS]' + (call.function.arguments | tojson) }}
    {%- endfor %}"""
_WHOLE = """
{%- set ns = namespace(first=none, last=none) %}
{%- for m in messages %}
  {%- if m.role == 'user' and (loop.first or loop.previtem.role != 'user') %}
    {%- set ns.last = loop.index0 %}
    {%- if ns.first is none %}{% set ns.first = loop.index0 %}{% endif %}
  {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
  {%- if m.role in ('system', 'developer') %}
    {{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
  {%- elif m.role == 'user' %}
    {%- if loop.first or loop.previtem.role != 'user' %}
      {%- if tools and loop.index0 == ns.@PLACE@ %}
        {{- '[AVAILABLE_TOOLS][' }}
        {%- for tool in tools %}
          {%- set f = tool.function %}
          {{- ', ' if not loop.first }}
          {{- {'type': 'function', 'function': {'name': f.name, 'description': f.description or '',
                                                'parameters': f.parameters or {}}} | tojson }}
        {%- endfor %}
        {{- '][/AVAILABLE_TOOLS]' }}
      {%- endif %}
      {{- '[INST]' }}
    {%- else %}
      {{- '\\n\\n' }}
    {%- endif %}
    {{- m.content }}
    {{- '[/INST]' if loop.last or loop.nextitem.role != 'user' }}
  {%- elif m.role == 'assistant' %}
    {{- m.content.rstrip(' ') if m.content else '' }}
    {%- if m.tool_calls %}@CALLS@
    {%- endif %}
    {{- eos_token }}
  {%- elif m.role == 'tool' %}
    {{- '[TOOL_RESULTS]' + @RESULT@ + m.content + '[/TOOL_RESULTS]' }}
  {%- endif %}
{%- endfor %}"""


def _template(calls: str, identity: str, result: str, place: str) -> str:
    parts = {"@CALLS@": calls.replace("@ID@", identity), "@RESULT@": result, "@PLACE@": place}
    whole = _WHOLE.lstrip("\n")
    for mark, text in parts.items():
        whole = whole.replace(mark, text)
    return whole


_IDENTITY = "('[CALL_ID]' + call.id if call.id and call.id != 'null' else '')"
_RESULT = "m.tool_call_id + '[TOOL_CONTENT]'"
TEMPLATES = {
    "v7": _template(_V7_CALLS, "", _RESULT, "last"),
    "v11": _template(_MARKED_CALLS, _IDENTITY, _RESULT, "last"),
    "v13": _template(_MARKED_CALLS, "''", "''", "first"),
}
"""By the version that tekken.json names; others are written in ways that a template cannot, or differ."""
