# ruff: noqa: E501, RUF043
"""Tool calls and thoughts in a model's text: every format, every chunking, broken and cut."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.errors import UsageError
from rvllm.text.chat.reasoning import FORMATS as REASONING
from rvllm.text.chat.reasoning import ReasoningSplitter, begins_within, reasoning_format
from rvllm.text.grammar.grammar import check, grammar_of, with_lead
from rvllm.text.tokenizers.gguf import from_metadata
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.text.tools.calls_grammar import Function, calls_or_form, forced_calls, offered_calls
from rvllm.text.tools.choose import FORMATS, ToolFormat, tool_format, unread_format
from rvllm.text.tools.events import CallArguments, CallStart, Event, Text
from support.text.tiny_tokenizers import byte_level, byte_level_metadata

ARGUMENTS = {"city": 'Zür"ich}', "days": [1, {"a": "]"}], "深": None}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
BAR = "｜"
DSML = f"{BAR}DSML{BAR}"

# (format, text, words, calls as (name, arguments' text))
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "no call < here <tool_ at all\n", "no call < here <tool_ at all\n", []),
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {WRITTEN}}}\n</tool_call>', "", [("f", WRITTEN)]),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {WRITTEN}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g"}\n</tool_call>\nDone now.',
        "Let me see.Done now.",
        [("f", WRITTEN), ("g", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": [1, ', "", [("f", '{"x": [1, ')]),
    ("hermes", "<tool_call>\nnot json</tool_call>", "<tool_call>\nnot json</tool_call>", []),
    ("hermes", '<tool_call>{"nom": 1}</tool_call>', '<tool_call>{"nom": 1}</tool_call>', []),
    ("hermes", f' {{"name": "f", "arguments": {WRITTEN}}}\n{{"name": "g"}}', "", [("f", WRITTEN), ("g", "{}")]),
    ("hermes", '{"name": "stranger", "arguments": {}}', '{"name": "stranger", "arguments": {}}', []),
    ("hermes", '{"name": "f"} {"a": 1}', ' {"a": 1}', [("f", "{}")]),
    ("hermes", 'Like {"name": "f"}', 'Like {"name": "f"}', []),
    ("hermes", '<tool_call>{"name": "stranger"}</tool_call>', "", [("stranger", "{}")]),
    ("llama3_json", f'{{"name": "f", "parameters": {WRITTEN}}}', "", [("f", WRITTEN)]),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 2}}',
        "",
        [("f", "{}"), ("g", '{"a": 2}')],
    ),
    ("llama3_json", '{"name": "stranger", "parameters": {}} is JSON', '{"name": "stranger", "parameters": {}} is JSON', []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", 'Call {"name": "f"}', 'Call {"name": "f"}', []),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "f", "arguments": {WRITTEN}}}, {{"name": "g", "arguments": {{}}, "id": "abcdefghi"}}]',
        "",
        [("f", WRITTEN), ("g", "{}")],
    ),
    ("mistral", "A [list] of [TOOLS", "A [list] of [TOOLS", []),
    ("mistral_args", f"ok[TOOL_CALLS]f[ARGS]{WRITTEN}[TOOL_CALLS]g{{}}", "ok", [("f", WRITTEN), ("g", "{}")]),
    ("mistral_args", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (
        "command_r",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": ' + WRITTEN + "},\n"
        '    {"tool_call_id": "1", "tool_name": "g", "parameters": {}}\n]<|END_ACTION|>',
        "",
        [("f", WRITTEN), ("g", "{}")],
    ),
    ("command_r", "<|START_RESPONSE|>Hello there<|END_RESPONSE|>", "Hello there", []),
    (
        "deepseek_v3",
        f"Well.<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>f\n```json\n{WRITTEN}\n```"
        f"<{BAR}tool▁call▁end{BAR}>\n<{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>g\n```json\n{{}}\n```"
        f"<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>",
        "Well.",
        [("f", WRITTEN), ("g", "{}")],
    ),
    (
        "deepseek_v31",
        f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>f<{BAR}tool▁sep{BAR}>{WRITTEN}<{BAR}tool▁call▁end{BAR}>"
        f"<{BAR}tool▁calls▁end{BAR}>",
        "",
        [("f", WRITTEN)],
    ),
    (
        "kimi_k2",
        f"Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{WRITTEN}<|tool_call_end|>"
        "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "Ok.",
        [("f", WRITTEN), ("g", "{}")],
    ),
    (
        "command_r_action",
        'Plan: act.\nAction:\n```json\n[\n    {\n        "tool_name": "f",\n        "parameters": ' + WRITTEN
        + '\n    },\n    {"tool_name": "g", "parameters": {}}\n]```',
        "Plan: act.",
        [("f", WRITTEN), ("g", "{}")],
    ),
    ("command_r_action", "Action: is what counts. Action", "Action: is what counts. Action", []),
    (
        "qwen3_coder",
        "I look.\n\n<tool_call>\n<function=f>\n<parameter=city>\nOslo\nand \"Rome\" <b>\n</parameter>\n<parameter=n>\n1\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "I look.",
        [("f", '{"city": "Oslo\\nand \\"Rome\\" <b>", "n": "1"}'), ("g", "{}")],
    ),
    ("qwen3_coder", "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "", [("f", '{"a": "1"}')]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n<parameter=b>x</function>", "", [("f", '{"a": "1", "b": "x"}')]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>cut", "", [("f", '{"a": "1"')]),
    ("qwen3_coder", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "", [("f", "{}")]),
    ("qwen3_coder", "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
    ("seed_oss", "<seed:tool_call>\n<function=f>\n<parameter=a>x</parameter>\n</function>\n</seed:tool_call>", "", [("f", '{"a": "x"}')]),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">x y</parameter>\n</invoke>\n<invoke name="g">\n</invoke>\n</minimax:tool_call>',
        "",
        [("f", '{"a": "x y"}'), ("g", "{}")],
    ),
    (
        "glm45",
        "\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x\ny</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
        "<tool_call>g</tool_call>",
        "",
        [("f", '{"a": "x\\ny", "b": "2"}'), ("g", "{}")],
    ),
    ("glm45", "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", "", [("f", '{"a": "1"}')]),
    ("glm45", "<tool_call>no call at all\n\nreally</tool_call>", "<tool_call>no call at all\n\nreally</tool_call>", []),
    ("nemotron_json", f'<TOOLCALL>[{{"name": "f", "arguments": {WRITTEN}}}]</TOOLCALL>', "", [("f", WRITTEN)]),
    ("hunyuan_a13b", f'<tool_calls>[{{"name": "f", "arguments": {WRITTEN}}}, {{"name": "g"}}]</tool_calls>', "", [("f", WRITTEN), ("g", "{}")]),
    ("hunyuan_a13b", '<tool_calls>\n{"name": "f", "arguments": {}}\n{"name": "g"}\n</tool_calls>', "", [("f", "{}"), ("g", "{}")]),
    ("phi4_mini_json", f'functools[{{"name": "f", "arguments": {WRITTEN}}}, {{"name": "g"}}]', "", [("f", WRITTEN), ("g", "{}")]),
    ("phi4_mini_json", "functools are tools", "functools are tools", []),
    ("phi4_marked", f'<|tool_call|>{{"name": "f", "arguments": {WRITTEN}}}<|/tool_call|>', "", [("f", WRITTEN)]),
    ("granite", f'<|tool_call|>[{{"name": "f", "arguments": {WRITTEN}}}]', "", [("f", WRITTEN)]),
    ("granite_20b_fc", '<function_call> {"name": "f", "arguments": {}}\n<function_call> {"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
    ("functionary_v31", f"<function=f>{WRITTEN}</function><function=g>{{}}</function>", "", [("f", WRITTEN), ("g", "{}")]),
    ("functionary_v31", "<function=f>words</function>", "<function=f>words</function>", []),
    (
        "llama4_pythonic",
        "[f(city=\"Zür']\", days=[1, -2.5, {'a': None}], ok=True, no=false), g()]",
        "",
        [("f", '{"city": "Zür\']", "days": [1, -2.5, {"a": null}], "ok": true, "no": false}'), ("g", "{}")],
    ),
    ("llama4_pythonic", "[1, 2]", "[1, 2]", []),
    ("llama4_pythonic", "[stranger(a=1)]", "[stranger(a=1)]", []),
    ("llama4_pythonic", "[f(1)] and [f(", "[f(1)] and [f(", []),
    ("llama4_pythonic", "<|python_start|>[f(a='x')]<|python_end|>", "", [("f", '{"a": "x"}')]),
    ("lfm2", '<|tool_call_start|>[f(a="x")]<|tool_call_end|>Done.', "Done.", [("f", '{"a": "x"}')]),
    ("olmo3", 'Well.\n<function_calls>\nf(a="x")\ng()\n</function_calls>', "Well.", [("f", '{"a": "x"}'), ("g", "{}")]),
    ("olmo3", "<function_calls>\nnone\n</function_calls>", "<function_calls>\nnone\n</function_calls>", []),
    (
        "deepseek_v32",
        f'I look.\n\n<{DSML}function_calls>\n<{DSML}invoke name="f">\n'
        f'<{DSML}parameter name="city" string="true">7</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">[1, {{"a": null}}]</{DSML}parameter>\n</{DSML}invoke>\n'
        f'<{DSML}invoke name="g">\n</{DSML}invoke>\n</{DSML}function_calls>',
        "I look.",
        [("f", '{"city": "7", "days": [1, {"a": null}]}'), ("g", "{}")],
    ),
    ("deepseek_v4", f'<{DSML}tool_calls>\n<{DSML}invoke name="g">\n</{DSML}invoke>\n</{DSML}tool_calls>', "", [("g", "{}")]),
    ("deepseek_v32", f'<{DSML}invoke name="f">\n<{DSML}parameter name="x" string="tr', "", [("f", "{")]),
    (
        "minicpm5",
        '<function name="f"><param name="a">x</param><param name="b"><![CDATA[<b>&\n</param>]]></param></function>\n'
        '<function name="g"></function>',
        "",
        [("f", '{"a": "x", "b": "<b>&\\n</param>"}'), ("g", "{}")],
    ),
    (
        "hy_v3",
        "<tool_calls:opensource>\n<tool_call:opensource>f<tool_sep:opensource>\n<arg_key:opensource>a</arg_key:opensource>\n"
        "<arg_value:opensource>x y</arg_value:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
        "",
        [("f", '{"a": "x y"}')],
    ),
    (
        "gemma4",
        'Yes.<|tool_call>call:f{city:<|"|>Zür"ich, {x}<|"|>,days:[1,{a:<|"|>]<|"|>,<|"|>b c<|"|>:true}],n:null}<tool_call|>'
        "<|tool_call>call:g{}<tool_call|>",
        "Yes.",
        [("f", '{"city": "Zür\\"ich, {x}", "days": [1, {"a": "]", "b c": true}], "n": null}'), ("g", "{}")],
    ),
    ("gemma4", "<|tool_call>call:f{left:108.,right:-.5}<tool_call|>", "", [("f", '{"left": 108.0, "right": -0.5}')]),
    ("gemma4", "<|tool_call>none{", "<|tool_call>none{", []),
    ("gemma4", '<|tool_call>call:f{a:<|"|>x', "", [("f", '{"a": "x"')]),
    ("functiongemma", "<start_function_call>call:f{a:<escape>x<escape>,b:2.5}<end_function_call>", "", [("f", '{"a": "x", "b": 2.5}')]),
    (
        "gigachat3",
        f'Well.<|message_sep|>\n\nfunction call<|role_sep|>\n{{"name": "f", "arguments": {WRITTEN}}}<|message_sep|>',
        "Well.",
        [("f", WRITTEN)],
    ),
    ("gigachat31", '<|function_call|>{"name": "g", "arguments": {}}', "", [("g", "{}")]),
    ("longcat", '<longcat_tool_call>{"name": "g"}</longcat_tool_call>\n', "", [("g", "{}")]),
    ("internlm", 'So.<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": 1}}<|action_end|>', "So.", [("f", '{"a": 1}')]),
    ("apertus", f'<|tools_prefix|>[{{"f": {WRITTEN}}}, {{"g": {{}}}}]<|tools_suffix|>', "", [("f", WRITTEN), ("g", "{}")]),
    ("apertus", "<|tools_prefix|>[1]", "<|tools_prefix|>[1]", []),
    ("xlam", f'[{{"name": "f", "arguments": {WRITTEN}}}, {{"name": "g", "arguments": {{}}}}]', "", [("f", WRITTEN), ("g", "{}")]),
    ("xlam", '```json\n[{"name": "g", "arguments": {}}]\n```', "", [("g", "{}")]),
    ("xlam", '[{"name": "stranger"}]', '[{"name": "stranger"}]', []),
    ("xlam", "No.", "No.", []),
]  # fmt: skip


def format_named(name: str) -> ToolFormat:
    found = tool_format(name, None)
    assert found is not None
    return found


def test_plain_text_is_typed_by_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer"}, "x": {"type": "number"}, "ok": {"type": "boolean"}, "s": {"type": "string"},
            "l": {"type": "array"}, "o": {"type": ["object", "null"]}, "e": {"$ref": "#/$defs/E"},
            "u": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        },
        "$defs": {"E": {"enum": [1, 2]}},
    }  # fmt: skip
    values = {
        "n": "3",
        "x": "2.5",
        "ok": "True",
        "s": "7",
        "l": "[1]",
        "o": "null",
        "e": "2",
        "u": "x",
        "free": "1",
    }
    for name, before, after in (
        ("qwen3_coder", "<tool_call>\n<function=f>\n", "</function>\n</tool_call>"),
        ("glm45", "<tool_call>f\n", "</tool_call>"),
    ):
        found = format_named(name)
        assert found.members is not None
        members = (
            found.members.before.replace("KEY", k) + v + found.members.after for k, v in values.items()
        )
        events = found.parser(["f"], {"f": schema}).feed(before + "".join(members) + after, final=True)
        text = "".join(e.text for e in events if isinstance(e, CallArguments))
        assert json.loads(text) == {"n": 3, "x": 2.5, "ok": True, "s": "7", "l": [1], "o": None, "e": 2, "u": "x",
                                    "free": "1"}  # fmt: skip


def test_a_value_that_is_not_of_its_type_stays_text() -> None:
    schema = {"properties": {"n": {"type": "integer"}, "m": {"type": "integer"}}}
    text = "<function=f><parameter=n>\nmany\n</parameter><parameter=m>1.5</parameter></function>"
    events = format_named("qwen3_coder").parser(["f"], {"f": schema}).feed(text, final=True)
    assert json.loads("".join(e.text for e in events if isinstance(e, CallArguments))) == {
        "n": "many",
        "m": "1.5",
    }


def parse(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]], list[Event]]:
    """(words, calls, events in order) of a text that comes in pieces."""
    parser = format_named(name).parser(["f", "g"])
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.feed("", final=True)
    words = "".join(e.text for e in events if isinstance(e, Text))
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1, "arguments of a call that is over"
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return words, calls, events


@pytest.mark.parametrize(("name", "text", "words", "calls"), CASES)
def test_calls_are_found(name: str, text: str, words: str, calls: list[tuple[str, str]]) -> None:
    assert parse(name, [text])[:2] == (words, calls)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunking_changes_nothing(data: st.DataObject) -> None:
    name, text, words, calls = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(name, pieces)[:2] == (words, calls)


_SCRAPS = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|START_ACTION|>", f"<{BAR}tool▁sep{BAR}>",
         f"<{BAR}tool▁call▁begin{BAR}>", "function", "```json", "\n", " ", "{", "}", "[", "]", '"', ":", ",", '"name"', '"f"',
         '"arguments"', "{}", "\\", "x", "1", "<function=", "<parameter=", ">", "</parameter>", "</function>", "<arg_key>",
         "</arg_key>", "<arg_value>", "</arg_value>", "Action:", "functools", "f(", ")", "=", "'", "<|tool_call|>", '{"name": "f", "arguments": {', "<|python_tag|>", ";", "<|tool_call>", "call:f{",
         '<|"|>', "<escape>", "<start_function_call>", f'<{DSML}invoke name="', f'<{DSML}parameter name="', '">', '<function name="',
         '<param name="', "<![CDATA[", "]]>", "<tool_call:opensource>", "<tool_sep:opensource>", "<|tools_prefix|>", '[{"f"',
         "<function_calls>", "f()", "</function_calls>", "<|action_start|>", "<|plugin|>"]
    ),
    max_size=14,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([f.name for f in FORMATS]), _SCRAPS, st.lists(st.integers(0, 200), max_size=8))
def test_scraps_never_break_a_parser_and_chunks_never_matter(
    name: str, scraps: list[str], cuts: list[int]
) -> None:
    text = "".join(scraps)
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(name, [text])
    assert parse(name, pieces)[:2] == whole[:2] == parse(name, list(text))[:2]


def test_arguments_are_streamed_as_they_come() -> None:
    parser = format_named("hermes").parser()
    assert parser.feed('<tool_call>{"name": "f", "arguments"') == []
    assert parser.feed(': {"city": "Os') == [CallStart(0, "f"), CallArguments(0, '{"city": "Os')]
    assert parser.feed('lo"}') == [CallArguments(0, 'lo"}')]
    assert parser.feed("}</tool_call>") == []


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for t in tools %}<tool_call>\n{\"name\": <function-name>", "hermes"),
        ("{{ tools }} [AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("{{ tools }} [TOOL_CALLS] x [ARGS]", "mistral_args"),
        ('{{ tools }} Respond in the format {"name": function name, "parameters": dictionary', "llama3_json"),
        ("{{- '\"parameters\": ' }}{{ tools }}", "llama3_json"),
        ("{{ tools }}<|START_ACTION|>", "command_r"),
        (f"{{{{ tools }}}}<{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>", "deepseek_v3"),
        (f"{{{{ tools }}}}<{BAR}tool▁call▁begin{BAR}>' + name + '<{BAR}tool▁sep{BAR}>", "deepseek_v31"),
        ("{{ messages }}", None),
        ("{{ tools }}", None),
    ],
)  # fmt: skip
def test_the_format_is_chosen_from_the_template(template: str, name: str | None) -> None:
    found = tool_format("auto", template)
    assert (found.name if found else None) == name


WRITES = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls %}"
WRITTEN_CALLS = {
    "qwen3_coder": "{{ '<tool_call>\\n<function=' + c.function.name + '>' }}{% for k, v in c.function.arguments | items %}"
    "{{ '<parameter=' + k + '>\\n' + v + '\\n</parameter>' }}{% endfor %}{{ '</function>\\n</tool_call>' }}",
    "glm45": "{{ '<tool_call>' + c.function.name }}{% for k, v in c.function.arguments | items %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>",
    "hermes": "<tool_call>{{ c.function | tojson }}</tool_call>",
    "command_r_action": "{{ 'Action:\\n```json\\n[{\\\"tool_name\\\": \\\"' + c.function.name + '\\\", \\\"parameters\\\": ' }}"
    "{{ c.function.arguments | tojson }}}]```",
    "llama3_json": "{{ '{\\\"name\\\": \\\"' + c.function.name + '\\\", \\\"parameters\\\": ' }}{{ c.function.arguments | tojson }}}",
    "granite": "<|tool_call|>[{{ c.function | tojson }}]",
    "llama4_pythonic": "[{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}=\"{{ v }}\"{% endfor %})]",
    "deepseek_v3": f"{BAR}".join(["{{ '<", "tool▁call▁begin", ">function<", "tool▁sep", ">' + c.function.name + '\\n```json\\n' + "
    "c.function.arguments + '\\n```<", "tool▁call▁end", ">' }}"]),
    "gigachat3": "function call<|role_sep|>{{ '\\n' }}{{ c.function | tojson }}",
    "gemma4": "<|tool_call>call:{{ c.function.name }}{{ '{' }}{% for k, v in c.function.arguments | items %}{{ k }}:<|\"|>{{ v }}"
    "<|\"|>{% endfor %}{{ '}' }}<tool_call|>",
    None: "<<{{ c.function.name }}|{{ c.function.arguments | tojson }}>>",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN_CALLS)
def test_the_format_is_the_one_in_which_the_template_writes_a_call(name: str | None) -> None:
    template = WRITES + WRITTEN_CALLS[name] + "{% endfor %}{% endfor %}"
    found = tool_format("auto", template)
    assert (found.name if found else None) == name


def test_a_call_behind_an_unknown_mark_is_no_bare_call() -> None:
    template = WRITES + "<strange>{{ c.function | tojson }}{% endfor %}{% endfor %}"
    assert tool_format("auto", template) is None


def test_formats_that_are_not_read_are_named() -> None:
    assert "harmony" in (unread_format("{{ tools }}<|start|>assistant<|channel|>commentary") or "")
    assert unread_format("{{ tools }}") is None


def test_unknown_parsers_are_refused_by_name() -> None:
    assert tool_format("none", "<tool_call> tools") is None
    assert tool_format("qwen", None) is tool_format("hermes", None)
    with pytest.raises(UsageError, match="tool-call-parser.*hermes"):
        tool_format("x", None)
    with pytest.raises(UsageError, match="reasoning-parser.*think"):
        reasoning_format("x", None)


TOOLS = [
    Function("f", {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
                   "additionalProperties": False, "$defs": {"City": {"type": "string", "enum": ["Oslo", "Rom\"a"]}}}),
    Function("g", None),
]  # fmt: skip


def native_of(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(tokenizer.backend.to_str(), eos_token=[tokenizer.eos_token_id])


def accepts(native: LLTokenizer, grammar: str, ids: list[int]) -> bool:
    """Whether the grammar takes these tokens and may end behind them."""
    matcher = LLMatcher(native, grammar, log_level=0)
    return all(matcher.consume_token(token) for token in ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", [f.name for f in FORMATS])
@pytest.mark.parametrize("parallel", [False, True])
def test_forced_calls_are_read_back(name: str, parallel: bool) -> None:
    tokenizer, found = byte_level(), format_named(name)
    grammar = forced_calls(found, TOOLS, tokenizer, parallel=parallel)
    check(grammar, "tools")
    native = native_of(tokenizer)
    rng, counts = np.random.default_rng(0), set()
    for _ in range(8):
        matcher, tokens = LLMatcher(native, grammar, log_level=0), []
        while not matcher.is_stopped():
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            token = int(rng.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little"))))
            assert matcher.consume_token(token), matcher.get_error()
            tokens.append(token)
        words, calls, _ = parse(name, [tokenizer.decode(tokens).removesuffix(tokenizer.eos_token or "")])
        assert words.strip() == "" and calls
        for called, arguments in calls:
            value: Any = json.loads(arguments)
            assert value == {} if called == "g" else value["city"] in ("Oslo", 'Rom"a')
        counts.add(len(calls))
    assert (max(counts) > 1) == parallel


@pytest.mark.parametrize("parallel", [False, True])
def test_calls_of_strict_functions_fit_when_they_come(parallel: bool) -> None:
    tokenizer, hermes = Tokenizer(from_metadata(byte_level_metadata(), "tiny")), format_named("hermes")
    strict = [Function("f", TOOLS[0].parameters, strict=True), TOOLS[1]]
    assert offered_calls(hermes, strict, tokenizer, parallel=parallel) is None  # the mark is no token
    tokenizer.backend.add_tokens(["<tool_call>", "</tool_call>"])
    assert offered_calls(hermes, TOOLS, tokenizer, parallel=parallel) is None  # nothing is strict
    grammar = offered_calls(hermes, strict, tokenizer, parallel=parallel)
    assert grammar is not None
    check(grammar, "tools")
    native = native_of(tokenizer)
    oslo = '<tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call>'
    free = '<tool_call>\n{"name": "g", "arguments": {"any": [1]}}\n</tool_call>'
    for text, fits in (
        ("Just words { } 日本.\n", True),
        ("", True),
        ("Let me see.\n" + oslo, True),
        (free, True),
        (f"{oslo}\n{free}", parallel),
        (oslo.replace("Oslo", "Rome"), False),
        (oslo.replace('"f"', '"h"'), False),
        ('{"name": "f", "arguments": {"city": "Oslo"}}', True),
        ('{"name": "f", "arguments": {"city": "Rome"}}', False),
        ('{"name": "f", "arguments": {"city": "Oslo"}}\n{"name": "g", "arguments": {}}', parallel),
        ('{"name": "h", "arguments": 1} {"name": "fg"}', True),
        ('{ "arguments": {"city": "Rome"}, "name": "f"}', False),
    ):
        assert accepts(native, grammar, tokenizer.encode(text, add_special_tokens=False)) == fits, text


ARRAY = {"type": "array", "items": {"type": "integer"}}
NAMED = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", [f.name for f in FORMATS])
@pytest.mark.parametrize("thoughts", [False, True])
def test_a_form_leaves_room_for_calls(name: str, thoughts: bool) -> None:
    tokenizer, found = Tokenizer(from_metadata(byte_level_metadata(), "tiny")), format_named(name)
    tokenizer.backend.add_tokens(["<tool_call>", "</tool_call>"])
    strict = [Function("f", TOOLS[0].parameters, strict=True), TOOLS[1]]
    native = native_of(tokenizer)
    frame = found.frame
    begin = frame.call_before.replace("NAME", "f").replace("INDEX", "0")
    written = '{"city": "Oslo"}'
    if found.members:
        before, after = found.members.around("city", True)
        written = before + ("Oslo" if found.members.bare_strings else '"Oslo"') + after
    oslo = f"{frame.before}{begin}{written}{frame.call_after}{frame.after}"
    key = "parameters" if name == "llama3_json" else "arguments"
    bare = f'{{"name": "f", "{key}": {{"city": "Oslo"}}}}'
    for schema, fitting, unfit in ((ARRAY, "[1, 2]", '["a"]'), (NAMED, '{"name": "f"}', '{"name": 1}')):
        form = grammar_of(StructuredOutputsParams(json=schema))
        assert form is not None
        grammar = calls_or_form(found, strict, tokenizer, form, parallel=False)
        if thoughts:
            grammar = with_lead(grammar, "<think>", "</think>", tokenizer, opened=False)
        check(grammar, "tools")
        for text, fits in (
            (fitting, True),
            (unfit, False),
            ("Words.", False),
            (oslo, True),
            (oslo.replace("Oslo", "Rome"), False),
            (bare, name in ("hermes", "llama3_json")),
            (bare.replace("Oslo", "Rome"), False),
            ("<think>Hm.</think>\n" + fitting, thoughts),
            ("<think>Hm.</think>\n" + oslo, thoughts),
        ):
            assert accepts(native, grammar, tokenizer.encode(text, add_special_tokens=False)) == fits, text


def split(name: str, pieces: list[str], inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(REASONING[name], inside)
    found = [splitter.feed(piece) for piece in pieces] + [splitter.feed("", final=True)]
    return "".join(a for a, _ in found), "".join(b for _, b in found)


THOUGHTS = [
    ("think", "<think>\nHm, <b> </thin ok.\n</think>\n\nHello <think> you", False, ("Hm, <b> </thin ok.", "Hello <think> you")),
    ("think", "Hm.\n</think>Hello", True, ("Hm.", "Hello")),
    ("think", "Hm, cut <", True, ("Hm, cut <", "")),
    ("think", " <thin air> it is", False, ("", " <thin air> it is")),
    ("think", "<think></think>x", False, ("", "x")),
    ("mistral", "[THINK]a b[/THINK]c", False, ("a b", "c")),
    ("command-r", "<|START_THINKING|>a<|END_THINKING|>c ", False, ("a", "c ")),
    ("deepseek_r1", "I think.\n</think>\n\nAnswer", False, ("I think.", "Answer")),  # as vLLM's of that name
    ("deepseek_r1", "<think>\nI think.\n</think>\n\nAnswer", False, ("I think.", "Answer")),
    ("deepseek_r1", "I thi", False, ("I thi", "")),
    ("deepseek_r1", "<thi", True, ("<thi", "")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "inside", "expected"), THOUGHTS)
def test_thoughts_are_split_however_they_come(
    name: str, text: str, inside: bool, expected: tuple[str, str]
) -> None:
    assert split(name, [text], inside) == expected
    assert split(name, list(text), inside) == expected
    for cut in range(len(text)):
        assert split(name, [text[:cut], text[cut:]], inside) == expected


def test_reasoning_is_chosen_from_the_template_and_the_prompt() -> None:
    think = reasoning_format("auto", "... </think> ...")
    assert think is REASONING["think"] is reasoning_format("qwen3", None)
    assert reasoning_format("auto", "{{ messages }}") is None
    assert reasoning_format("none", "</think>") is None
    assert think is not None
    r1 = reasoning_format("deepseek_r1", None)
    assert r1 is not None and begins_within("assistant\n", r1) is True
    assert begins_within("assistant\n<think>\n\n</think>\n\n", r1) is None
    assert begins_within("assistant\n", think) is False and begins_within("", None) is None
    assert begins_within("assistant\n<think>\n", think) and not begins_within(
        "<think>\n\n</think>\n\n", think
    )


@pytest.mark.parametrize("end", ["</think>", "<|endoftext|>"])  # text, and one token
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("form", [{"json": {"type": "integer"}}, {"choice": ["a", "b"]}])
def test_thoughts_may_come_before_a_form(form: dict[str, Any], opened: bool, end: str) -> None:
    tokenizer = byte_level()
    grammar = with_lead(
        grammar_of(StructuredOutputsParams(**form)) or "", "<think>", end, tokenizer, opened=opened
    )
    check(grammar, "json")
    native = native_of(tokenizer)
    answer = "12" if "json" in form else "a"
    for text, fits in (
        (f"hm ok{end}\n\n{answer}", opened),
        (f"<think>hm{end}{answer}", not opened),
        (answer, not opened),
    ):
        assert accepts(native, grammar, tokenizer.encode(text, add_special_tokens=False)) == fits, text
