"""What clients of llama.cpp, SGLang, Codex and Anthropic send: served if it can be, else refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rvllm.api.schemas.requests import NEUTRAL, Refused
from rvllm.engine.sampling_params import StructuredOutputsParams
from rvllm.text.grammar.grammar import grammar_of
from support.doubles.server import LiveServer
from support.doubles.tool_calls import script

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


SERVER_SETTINGS = {"template": TEMPLATE, "tool_call_parser": "auto"}


def last_grammar(server: LiveServer) -> str | None:
    found: str | None = server.engine.requests[-1].sampling.grammar
    return found


@pytest.mark.parametrize(
    ("field", "form"),
    [
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "x"'}}, {"grammar": 'root ::= "x"'}),
        ({"response_format": {"type": "regex", "pattern": "[0-9]+"}}, {"regex": "[0-9]+"}),
        ({"json_schema": SCHEMA}, {"json": SCHEMA}),
        ({"json_schema": '{"type": "integer"}'}, {"json": '{"type": "integer"}'}),
        ({"grammar": 'root ::= "x"'}, {"grammar": 'root ::= "x"'}),
        ({"ebnf": 'root ::= "x"'}, {"grammar": 'root ::= "x"'}),
        ({"regex": "[0-9]+"}, {"regex": "[0-9]+"}),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_forms_under_neighbours_names(server: LiveServer, endpoint: str, field: Any, form: Any) -> None:
    if endpoint == "chat":
        status, answer = server.chat(**field)
    else:
        status, answer = server.post("/v1/completions", prompt="hello", **field)
    assert status == 200, answer
    assert last_grammar(server) == grammar_of(StructuredOutputsParams(**form))


def test_an_empty_grammar_is_none(server: LiveServer) -> None:
    assert server.chat(grammar="")[0] == 200
    assert last_grammar(server) is None


def test_numbers_under_neighbours_names(server: LiveServer) -> None:
    assert server.chat(repeat_penalty=1.5, n_predict=3)[0] == 200
    sampling = server.engine.requests[-1].sampling
    assert (sampling.repetition_penalty, sampling.max_tokens) == (1.5, 3)
    assert server.chat(repeat_penalty=1.5, repetition_penalty=1.25)[0] == 200
    assert server.engine.requests[-1].sampling.repetition_penalty == 1.25
    assert server.chat(repeat_penalty=-1)[0] == 400


@pytest.mark.parametrize(
    "name", ["typical_p", "mirostat", "dry_multiplier", "xtc_probability", "top_a", "top_n_sigma"]
)
def test_samplers_that_we_lack_are_refused_unless_they_are_off(server: LiveServer, name: str) -> None:
    assert name in Refused.__struct_fields__
    status, answer = server.chat(**{name: 0.5})
    assert status == 400 and answer["error"]["param"] == name
    for value in NEUTRAL[name]:
        assert server.chat(**{name: value})[0] == 200


def test_hosted_tools_are_left_out_of_a_response_and_named(server: LiveServer) -> None:
    tools = [{"type": "function", "name": "shell", "parameters": SCHEMA}, {"type": "web_search"},
             {"type": "local_shell"}]  # fmt: skip
    status, answer = server.post(
        "/v1/responses", input="hi", tools=tools, max_output_tokens=1, metadata={"k": "v"}
    )
    assert status == 200, answer
    assert answer["metadata"] == {"k": "v", "rvllm_tools_left_out": "web_search, local_shell"}
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert prompt.startswith("shell ") and "local_shell" not in prompt
    for choice in ("required", {"type": "function", "name": "local_shell"}):
        status, answer = server.post("/v1/responses", input="hi", tools=tools[1:], tool_choice=choice)
        assert status == 400 and answer["error"]["param"] == "tool_choice"


def test_records_of_hosted_calls_are_left_out_of_a_history(server: LiveServer) -> None:
    before = [
        {"role": "user", "content": "hi"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"role": "user", "content": "go on"},
    ]
    status, answer = server.post("/v1/responses", input=before, max_output_tokens=1)
    assert status == 200 and answer["metadata"] == {"rvllm_tools_left_out": "web_search_call"}
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert "user:hi\nuser:go on" in prompt


def test_half_a_character_in_a_call_of_the_history(server: LiveServer) -> None:
    function = {"name": "f", "arguments": '{"a": "x\\ud83d", "b": "\\ud83d\\ude00"}'}
    call = {"id": "c", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ]
    status, answer = server.chat(messages=messages)
    assert status == 200, answer
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert "x\ufffd" in prompt and "😀" in prompt


def test_custom_tools_are_given_a_text(server: LiveServer) -> None:
    rules = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin"'}
    tools = [{"type": "custom", "name": "apply_patch", "description": "Edits.", "format": rules}]
    before = [
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": 'say "x"'},
        {
            "type": "custom_tool_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "ok"}],
        },
        {"role": "user", "content": "again"},
    ]
    script(server, '<tool_call>\n{"name": "apply_patch", "arguments": {"input": "a\\nb"}}\n</tool_call>')
    asked = {"input": before, "tools": tools, "tool_choice": {"type": "custom", "name": "apply_patch"}}
    status, answer = server.post("/v1/responses", **asked)
    assert status == 200, answer
    (item,) = answer["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", "a\nb")
    assert item["id"].startswith("ctc_") and answer["tools"][0]["format"] == rules
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert "apply_patch" in prompt.partition("<tool_call>")[2] and "tool:ok" in prompt
    status, _, streamed = server.raw("POST", "/v1/responses", json.dumps({**asked, "stream": True}).encode())
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith(b"data: ")]
    told = [event for event in events if "custom_tool_call_input" in event["type"]]
    assert [event["type"].rpartition(".")[2] for event in told] == ["delta", "done"]
    assert told[0]["delta"] == told[1]["input"] == "a\nb"
    done = [event["item"]["id"] for event in events if event["type"] == "response.output_item.done"]
    assert done == [item["id"] for item in events[-1]["response"]["output"]]


@pytest.mark.parametrize("kind", ["bash_20250124", "text_editor_20250728", "memory_20250818"])
def test_anthropics_client_tools_become_functions(server: LiveServer, kind: str) -> None:
    tools = [{"type": kind, "name": "mine"}, {"type": "web_search_20250305", "name": "web_search"}]
    messages = [{"role": "user", "content": "hi"}]
    status, answer = server.post("/v1/messages", model="tiny", max_tokens=1, messages=messages, tools=tools)
    assert status == 200, answer
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert prompt.startswith("mine ") and "web_search" not in prompt


def test_a_broken_call_in_the_history_is_taken_back(server: LiveServer) -> None:
    function = {"name": "f", "arguments": '{"city": "Par'}
    messages = [
        {"role": "user", "content": "w"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "not valid"},
    ]
    status, answer = server.chat(messages=messages, max_tokens=1)
    assert status == 200, answer


def test_tools_without_a_place_in_the_template_are_refused() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with LiveServer(
        template="{{ messages[0].content }}", tool_call_parser="hermes", drain_timeout=0.2
    ) as server:
        status, answer = server.chat(tools=[tool])
        assert status == 400 and "no place for tools" in answer["error"]["message"]
        assert server.chat(tools=[tool], tool_choice="none")[0] == 200
