# ruff: noqa: E501
"""Tool calls, thoughts and forms through the official `openai` client, with scripted tokens."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from rvllm.config import ServerConfig
from rvllm.settings import settings_of
from rvllm.text.chat.reasoning import CHOICES as REASONING_CHOICES
from rvllm.text.tools.choose import CHOICES as TOOL_CHOICES
from support.doubles.server import LiveServer
from support.doubles.tool_calls import CALLS, TEMPLATE, script

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


SERVER_SETTINGS = {"template": TEMPLATE, "tool_call_parser": "auto"}


def test_the_whole_answer_has_calls_and_thoughts(client: openai.OpenAI, server: LiveServer) -> None:
    script(server, CALLS)
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER, CLOCK], max_tokens=250
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert calls is not None
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [  # type: ignore[union-attr]
        ("function", "weather", {"city": "Oslo 😀"}),
        ("function", "clock", {}),
    ]
    assert len({c.id for c in calls}) == 2 and all(c.id for c in calls)
    assert choice.message.reasoning_content == "Where? Oslo."  # type: ignore[attr-defined]


def test_the_tool_loop_streams(client: openai.OpenAI, server: LiveServer) -> None:
    script(server, CALLS)
    messages = list(HELLO)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, tools=[WEATHER, CLOCK], max_tokens=250, stream=True, n=2
        )
    )
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        thoughts = "".join(getattr(c.delta, "reasoning_content", None) or "" for c in mine)
        assert thoughts == "Where? Oslo."
        assert "".join(c.delta.content or "" for c in mine) == "I look."
        assert [c.finish_reason for c in mine if c.finish_reason] == ["tool_calls"]
        assert not mine[-1].delta.tool_calls and mine[-1].finish_reason, "the end is a chunk of its own"
        calls: dict[int, dict[str, str]] = {}
        pieces = 0
        for part in (call for c in mine for call in c.delta.tool_calls or []):
            assert part.function is not None
            if part.index not in calls:
                assert part.id and part.type == "function" and part.function.name
                assert part.function.arguments == "" and part.index == len(calls)
                calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            else:
                assert part.id is None and part.function.name is None
                calls[part.index]["arguments"] += part.function.arguments or ""
                pieces += 1
        assert [c["name"] for c in calls.values()] == ["weather", "clock"]
        assert json.loads(calls[0]["arguments"]) == {"city": "Oslo 😀"} and pieces > 3
    made = [
        {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
        for c in calls.values()
    ]
    messages += [
        {"role": "assistant", "content": None, "tool_calls": made},
        {"role": "tool", "tool_call_id": made[0]["id"], "content": "rain"},
    ]
    script(server, "It rains.")
    with client.chat.completions.stream(model="tiny", messages=messages, tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "It rains."
    assert final.choices[0].finish_reason == "stop"
    prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)
    assert "<tool_call>Oslo 😀</tool_call>" in prompt and "rain<|im_end|>" in prompt


def test_the_clients_own_accumulator_understands_calls(client: openai.OpenAI, server: LiveServer) -> None:
    script(server, CALLS)
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[WEATHER, CLOCK], max_tokens=250
    ) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [event.name for event in done] == ["weather", "clock"]
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_call_without_marks_and_no_second_one_unless_parallel(
    client: openai.OpenAI, server: LiveServer
) -> None:
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    script(server, f"{call}\n{call}")
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "max_tokens": 250}
    for parallel, count in ((True, 2), (False, 1)):
        (choice,) = client.chat.completions.create(**asked, parallel_tool_calls=parallel).choices
        assert [c.function.arguments for c in choice.message.tool_calls] == ['{"city": "Oslo"}'] * count
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        with client.chat.completions.stream(**asked, parallel_tool_calls=parallel) as stream:
            (choice,) = stream.get_final_completion().choices
        assert len(choice.message.tool_calls) == count and choice.finish_reason == "tool_calls"


def test_a_form_beside_tools(client: openai.OpenAI, server: LiveServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["formed"]}}}
    for choice, inside in (("auto", ["formed", "weather"]), ("required", ["weather"]), ("none", ["formed"])):
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[WEATHER],
            tool_choice=choice,
            response_format=form,
            max_tokens=5,
        )  # type: ignore[call-overload]
        grammar = server.engine.requests[-1].sampling.grammar
        assert grammar is not None
        assert [word for word in ("formed", "weather") if word in grammar] == inside


def test_no_tools_no_calls(client: openai.OpenAI, server: LiveServer) -> None:
    script(server, CALLS)
    for extra in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=250, **extra)  # type: ignore[call-overload]
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content == CALLS.partition("</think>\n\n")[2]


def test_thoughts_that_the_prompt_opened_and_thoughts_not_wanted(
    client: openai.OpenAI, server: LiveServer
) -> None:
    script(server, "Hm.</think>Yes.")
    extra = {"chat_template_kwargs": {"lead": "<think>\n"}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=99, extra_body=extra)
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].message.reasoning_content == "Hm."  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    thoughts = server.tokenizer.encode("Hm.</think>", add_special_tokens=False)
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(thoughts)
    script(server, "<think>Hm.</think>Yes.")
    response = client.responses.create(model="tiny", input="hello", max_output_tokens=99)
    thoughts = server.tokenizer.encode("<think>Hm.</think>", add_special_tokens=False)
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == len(thoughts)
    script(server, "Hm.</think>Yes.")
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=99, extra_body={**extra, "include_reasoning": False}
    )
    assert answer.choices[0].message.content == "Yes."
    assert not hasattr(answer.choices[0].message, "reasoning_content")


@pytest.mark.parametrize(
    ("choice", "parallel", "inside"),
    [
        ("required", None, ["weather", "clock", "call", "{0,15}"]),
        ("required", False, ["weather", "clock"]),
        ({"type": "function", "function": {"name": "clock"}}, None, ["clock"]),
    ],
)
def test_a_forced_choice_is_a_grammar(
    client: openai.OpenAI, server: LiveServer, choice: Any, parallel: bool | None, inside: list[str]
) -> None:
    extra = {} if parallel is None else {"parallel_tool_calls": parallel}
    client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=5, **extra
    )
    grammar = server.engine.requests[-1].sampling.grammar
    assert grammar is not None and all(part in grammar for part in inside)
    assert ("weather" in grammar) == ("weather" in inside)
    assert ("{0,15}" in grammar) == ("{0,15}" in inside)
    assert "</think>" in grammar  # a thinking model may think first


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, '"type": "object"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}}}, "integer"),
        ({"guided_json": {"type": "integer"}}, "integer"),
        ({"guided_json": '{"type": "integer"}'}, "integer"),
        ({"guided_regex": "ab+"}, "ab+"),
        ({"guided_choice": ["one", "two"]}, "one"),
        ({"guided_grammar": 'start: "lark"'}, "lark"),
        ({"guided_grammar": 'root ::= "gbnf"'}, "gbnf"),
        ({"structured_outputs": {"choice": ["one"]}}, "one"),
        ({"structured_outputs": {"json": {"type": "integer"}, "disable_any_whitespace": True}}, "whitespace_flexible"),
        ({"structural_tag": {"triggers": ["<f"], "structures": [{"begin": "<f=x>", "schema": {"type": "integer"}, "end": "</f>"}]}}, "</f>"),
    ],
)  # fmt: skip
def test_forms_reach_the_engine(server: LiveServer, body: dict[str, Any], expected: str) -> None:
    def found() -> str:
        return (server.engine.requests[-1].sampling.grammar or "").replace('\\"', '"').replace('":"', '": "')

    status, answer = server.chat(max_tokens=1, **body)
    assert status == 200, answer
    assert expected in found()
    status, answer = server.post("/v1/completions", prompt="hello", max_tokens=1, **body)
    assert status == 200, answer
    assert expected in found()
    assert len(server.engine.vocabularies) == 1  # once a server, before the first grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[1]"),
        ({"tools": [WEATHER] * 200}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}], "tool_choice": "required"}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    ],
)  # fmt: skip
def test_wrong_tools_are_a_400_that_names_them(server: LiveServer, body: dict[str, Any], param: str) -> None:
    before = len(server.engine.requests)
    status, answer = server.chat(**body)
    assert status == 400 and answer["error"]["param"] == param, answer
    assert len(server.engine.requests) == before


def test_allowed_tools_leave_out_the_others(server: LiveServer) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    asked = {"tools": [WEATHER, other], "tool_choice": choice, "max_tokens": 1}
    assert server.chat(**asked)[0] == 200
    grammar = server.engine.requests[-1].sampling.grammar
    assert grammar is not None and "weather" in grammar and "other" not in grammar


def test_what_asks_for_nothing_is_served(server: LiveServer) -> None:
    """No tools with a choice among them, and a function that gave nothing back."""
    assert server.chat(tools=[], tool_choice="auto", max_tokens=1)[0] == 200
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert (
        server.chat(messages=[*talk, {"role": "tool", "tool_call_id": "c1", "content": None}], max_tokens=1)[
            0
        ]
        == 200
    )


def test_tools_need_a_template_that_shows_them() -> None:
    with LiveServer(template="{{ messages }}", tool_call_parser="auto", drain_timeout=0.2) as server:
        status, answer = server.chat(tools=[WEATHER])
        assert status == 400 and "--tool-call-parser" in answer["error"]["message"]
        status, answer = server.chat(tools=[WEATHER], tool_choice="none", max_tokens=1)
        assert status == 200, answer


def test_the_flags_offer_every_parser() -> None:
    known = {f.name: setting for f, setting in settings_of(ServerConfig)}
    assert set(known["tool_call_parser"].choices) == set(TOOL_CHOICES)
    assert set(known["reasoning_parser"].choices) == set(REASONING_CHOICES)
