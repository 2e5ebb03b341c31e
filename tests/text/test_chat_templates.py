"""Chat templates render what Transformers renders; mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rvllm.errors import UsageError
from rvllm.text.chat.arguments import mended
from rvllm.text.chat.template import render_chat

GOLDEN = Path(__file__).parent.parent / "golden"
CHAT = [{"role": "user", "content": "Hi <b>&"}, {"role": "assistant", "content": "Hello"}]


def golden(name: str) -> list[Any]:
    value = json.loads((GOLDEN / f"chat_{name}.json").read_text(encoding="utf-8"))
    return [pytest.param(value["template"], case, id=f"{name}: {case['name']}") for case in value["cases"]]


@pytest.mark.parametrize(("template", "case"), golden("smollm2-135m") + golden("qwen2.5-coder-0.5b"))
def test_equals_transformers(template: str, case: dict[str, Any]) -> None:
    assert render_chat(template, case["messages"], **case["arguments"]) == case["text"]


EACH, END = "{% for m in messages %}", "{% endfor %}"
FEATURES = {
    "whitespace": EACH + "\n  {% if m.role %}\n {{- m.content -}} \n{% endif %}\n" + END + "\n",
    "loop controls": EACH + "{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}" + END,
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %}|" + END,
    "namespace": "{% set ns = namespace(n=0) %}" + EACH + "{% set ns.n = ns.n + 1 %}" + END + "{{ ns.n }}",
    "json": "{{ messages | tojson }} {{ {'b': 'ü', 'a': [1, None]} | tojson(indent=2, sort_keys=true) }}",
    "ascii json": "{{ {'b': 'ü<>'} | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "dict": "{{ dict(a=1, b='x') }} {{ dict(a=1).items() | list }}",
    "macros": "{% macro t(m) %}[{{ m.content | trim }}]{% endmacro %}" + EACH + "{{ t(m) }}" + END,
    "tools": "{% if tools is not none %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}",
    "documents": "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}",
    "variables": "{{ bos_token }}{{ enable_thinking | default('unset') }}{{ missing }}",
    "date": "{{ strftime_now('%Y') }}",
    "string methods": "{{ messages[0].content.split(' ')[0].upper() }}{{ messages[1]['content'][::-1] }}",
}


@pytest.mark.oracle
@pytest.mark.parametrize("template", FEATURES.values(), ids=FEATURES)
def test_features_equal_transformers(template: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    documents = [{"title": "A", "text": "ä"}]
    variables = {"bos_token": "<s>", "enable_thinking": False}
    theirs, _ = utils.render_jinja_template(
        conversations=[CHAT],
        tools=tools,
        documents=documents,
        chat_template=template,
        add_generation_prompt=True,
        **variables,
    )
    ours = render_chat(template, CHAT, tools=tools, documents=documents, variables=variables)
    assert ours == theirs[0]
    assert ours


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "line 1"),
        ("x\n{{ 1 + }}", "line 2"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ namespace(_x=1) }}", "_x"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("{% include 'x' %}", "loader"),
        ("{{ range(10000000) | list }}", "Range too big|OverflowError"),
    ],
)
def test_a_bad_template_is_named(template: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^chat template: .*({said})"):
        render_chat(template, CHAT)


ROLES = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
)


def test_parts_are_joined_for_templates_that_want_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat(ROLES, [{"role": "user", "content": parts}]) == "user:a\nb;"
    assert render_chat(PARTS, [{"role": "user", "content": parts}]) == "<a><b>"
    assigned = PARTS.replace("{% for p in m.content %}", "{% set c = m['content'] %}{% for p in c %}")
    assert render_chat(assigned, [{"role": "user", "content": parts}]) == "<a><b>"


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    before = json.dumps(messages)
    render_chat(PARTS, messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


def test_arguments_given_as_json_text_become_objects() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": [1, "ü"]}'}}
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render_chat(template, [{"role": "assistant", "tool_calls": [call]}]) == '{"x": [1, "ü"]}'


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "r"},
]
NULL_MARKS_CALLS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "<call>{{ m['tool_calls'][0]['function']['name'] }}"
    "{% elif m['content'] is not none %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
)
EMPTY_MARKS_CALLS = (
    "{% for m in messages %}{{ m.content + m.tool_calls[0].function.name if m.tool_calls else m.content }}"
    "{% endfor %}"
)
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].function.arguments }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
ITEM_ARGUMENTS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments | items %}"
    "<{{ k }}>{{ v }}{% endfor %}{% endfor %}{% endfor %}"
)
JSON_ARGUMENTS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.oracle
def test_null_content_reaches_a_template_that_looks_for_it() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    ((theirs,), _) = utils.render_jinja_template(conversations=[TALK], chat_template=NULL_MARKS_CALLS)
    assert (
        render_chat(NULL_MARKS_CALLS, TALK, add_generation_prompt=False) == theirs == "<user>a<call>f<tool>r"
    )


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_no_call_is_lost_for_the_way_in_which_its_content_is_empty(content: dict[str, Any]) -> None:
    talk = [TALK[0], {"role": "assistant", **content, "tool_calls": [CALL]}, TALK[2]]
    assert "<call>f" in render_chat(NULL_MARKS_CALLS, talk)
    assert render_chat(EMPTY_MARKS_CALLS, talk) == "afr"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_turn_without_content_is_empty(content: dict[str, Any]) -> None:
    assert render_chat(ROLES, [TALK[0], {"role": "assistant", **content}]) == "user:a;assistant:;"


def test_arguments_are_text_for_templates_that_join_them() -> None:
    assert render_chat(TEXT_ARGUMENTS, TALK) == 'a<call>{"a": 1}r'
    as_object = {**CALL, "function": {"name": "f", "arguments": {"a": "ü"}}}
    talk = [TALK[0], {**TALK[1], "tool_calls": [as_object]}]
    assert render_chat(TEXT_ARGUMENTS, talk) == 'a<call>{"a": "ü"}'


@pytest.mark.parametrize(
    ("arguments", "items"),
    [
        ('{"city": "Par', "<city>Par"),
        ('{"city": "a\nb"}', "<city>a\nb"),
        ('{"a": 1, "b": [1, {"c": "x', "<a>1<b>[1, {'c': 'x'}]"),
        ('{"a": 1, "b": tr', "<a>1"),
        ('{"a": 1, "b', "<a>1"),
        ('{"a": "x\\', "<a>x"),
        ('{"a": 1} and so on', "<a>1"),
        ("", ""),
        ("{", ""),
        ("nonsense", ""),
    ],
)
def test_broken_arguments_are_taken_back(arguments: str, items: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    talk = [TALK[0], {**TALK[1], "tool_calls": [call]}, TALK[2]]
    assert render_chat(TEXT_ARGUMENTS, talk) == f"a<call>{arguments}r"
    assert render_chat(ITEM_ARGUMENTS, talk) == items


def test_broken_arguments_stay_what_they_are_where_they_are_shown_as_json() -> None:
    """As Transformers renders the message: the text becomes a JSON string."""
    cut = '{"city": "Par'
    talk = [TALK[0], {**TALK[1], "tool_calls": [{**CALL, "function": {"name": "f", "arguments": cut}}]}]
    assert json.loads(render_chat(JSON_ARGUMENTS, talk)) == {"name": "f", "arguments": cut}


def test_text_becomes_a_part_for_templates_that_show_parts_alone() -> None:
    only_parts = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert render_chat(only_parts, [{"role": "user", "content": "hi"}]) == "<hi>"


def test_reasoning_under_any_of_its_names() -> None:
    message = {"role": "assistant", "content": "x", "reasoning": "why"}
    assert render_chat("{{ messages[0].reasoning_content }}", [message]) == "why"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must not be empty"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url' are not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
        ([{"role": "assistant", "tool_calls": ["x"]}], r"messages\[0\].tool_calls must hold"),
    ],
)  # fmt: skip
def test_bad_messages_are_named(messages: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        render_chat(ROLES, messages)


def test_endless_nesting_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(UsageError, match="nested too deeply"):
        render_chat(ROLES, [{"role": "user", "content": "x", "extra": loop}])
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    assert render_chat("{{ tools[0] | tojson }}", CHAT, tools=[{"a": deep}]).count("[") == 300


def test_continuing_and_prompting_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        render_chat(ROLES, CHAT, continue_final_message=True)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "fixed", "{{ messages[1].content[:2] }}"])
def test_a_template_that_drops_the_final_message_cannot_continue_it(template: str) -> None:
    with pytest.raises(UsageError, match="changes or drops the last message"):
        render_chat(template, CHAT, add_generation_prompt=False, continue_final_message=True)


def test_nothing_to_continue() -> None:
    with pytest.raises(UsageError, match="has no text to continue"):
        render_chat(ROLES, [{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "b": [1, 2', {"a": 1, "b": [1, 2]}),
        ('{"a": 1, "b": "x', {"a": 1, "b": "x"}),
        ('{"a": "} \\" {", "b": {"c": 3}', {"a": '} " {', "b": {"c": 3}}),
        ('{"a": 1, "b": tru', {"a": 1}),
        ('{"a": 1}', {"a": 1}),
        ("[1, 2", {}),
        ("nothing", {}),
    ],
)
def test_arguments_that_break_off_are_closed(text: str, value: dict[str, Any]) -> None:
    assert mended(text) == value
