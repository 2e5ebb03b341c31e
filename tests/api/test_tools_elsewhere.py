"""Calls, thoughts and forms in Anthropic's messages and OpenAI's responses, with scripted tokens."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from support.doubles.server import LiveServer
from support.doubles.tool_calls import CALLS, TEMPLATE, script

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CLAUDE_TOOLS: list[Any] = [
    {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA},
    {"name": "clock", "input_schema": {"type": "object"}},
]
RESPONSE_TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
    {"type": "function", "name": "clock", "parameters": {"type": "object"}, "strict": False},
]


SERVER_SETTINGS = {"template": TEMPLATE, "tool_call_parser": "auto"}


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropics_tool_loop(claude: anthropic.Anthropic, server: LiveServer, streamed: bool) -> None:
    script(server, CALLS)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 220, "messages": HELLO, "tools": CLAUDE_TOOLS}
    if streamed:
        with claude.messages.stream(**asked) as stream:
            answer = stream.get_final_message()
    else:
        answer = claude.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    thought, words, weather, clock = answer.content
    assert thought.type == "thinking" and thought.thinking == "Where? Oslo."
    assert words.type == "text" and words.text == "I look."
    assert weather.type == "tool_use" and (weather.name, weather.input) == ("weather", {"city": "Oslo 😀"})
    assert clock.type == "tool_use" and (clock.name, clock.input) == ("clock", {})
    assert weather.id and clock.id and weather.id != clock.id
    script(server, "Rain.")
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": weather.id, "content": "wet"},
        {"type": "tool_result", "tool_use_id": clock.id, "content": [{"type": "text", "text": "noon"}]},
    ]
    turns: list[Any] = [*HELLO, {"role": "assistant", "content": [b.to_dict() for b in answer.content]},
                        {"role": "user", "content": results}]  # fmt: skip
    final = claude.messages.create(model="tiny", max_tokens=50, messages=turns, tools=CLAUDE_TOOLS)
    assert final.stop_reason == "end_turn"
    assert [block.type for block in final.content] == ["text"]
    seen = server.last_prompt()
    assert seen.index("Oslo 😀") < seen.index("wet") < seen.index("noon")


def test_anthropics_choices(claude: anthropic.Anthropic, server: LiveServer) -> None:
    script(server, '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')
    for choice in ({"type": "any"}, {"type": "tool", "name": "clock"}):
        answer = claude.messages.create(model="tiny", max_tokens=100, messages=HELLO, tools=CLAUDE_TOOLS,
                                        tool_choice=choice)  # type: ignore[arg-type]  # fmt: skip
        assert server.engine.requests[-1].sampling.grammar is not None
        assert answer.stop_reason == "tool_use"
    claude.messages.create(model="tiny", max_tokens=1, messages=HELLO, tools=CLAUDE_TOOLS,
                           tool_choice={"type": "none"})  # fmt: skip
    assert "weather" not in server.last_prompt()
    with pytest.raises(anthropic.BadRequestError, match="nothing"):
        claude.messages.create(model="tiny", max_tokens=1, messages=HELLO, tools=CLAUDE_TOOLS,
                               tool_choice={"type": "tool", "name": "nothing"})  # fmt: skip


def test_a_call_that_is_cut_off_is_still_a_message(claude: anthropic.Anthropic, server: LiveServer) -> None:
    script(server, CALLS)
    whole = len(server.engine.answer)
    for limit in range(1, whole, 7):
        with claude.messages.stream(model="tiny", max_tokens=limit, messages=HELLO, tools=CLAUDE_TOOLS) as s:
            for _ in s:
                pass
            assert s.current_message_snapshot.stop_reason in ("max_tokens", "tool_use")


@pytest.mark.parametrize("streamed", [False, True])
def test_the_responses_tool_loop(client: openai.OpenAI, server: LiveServer, streamed: bool) -> None:
    script(server, CALLS)
    if streamed:
        with client.responses.stream(model="tiny", input="hello", tools=RESPONSE_TOOLS) as stream:
            kinds = [event.type for event in stream]
            answer: Any = stream.get_final_response()
        assert kinds.count("response.function_call_arguments.done") == 2
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 4
        assert "response.reasoning_text.delta" in kinds and kinds[-1] == "response.completed"
    else:
        answer = client.responses.create(model="tiny", input="hello", tools=RESPONSE_TOOLS)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    thought, message, weather, clock = answer.output
    assert thought.content[0].text == "Where? Oslo." and message.content[0].text == "I look."
    assert (weather.name, json.loads(weather.arguments)) == ("weather", {"city": "Oslo 😀"})
    assert (clock.name, json.loads(clock.arguments)) == ("clock", {})
    script(server, "Rain.")
    final = client.responses.create(
        model="tiny", tools=RESPONSE_TOOLS, previous_response_id=answer.id, input=[
            {"type": "function_call_output", "call_id": weather.call_id, "output": "wet"},
            {"type": "function_call_output", "call_id": clock.call_id, "output": "noon"},
        ])  # fmt: skip
    assert final.status == "completed" and final.output_text == "Rain."
    seen = server.last_prompt()
    assert seen.index("Oslo 😀") < seen.index("wet") < seen.index("noon")
    assert seen.count("<|im_start|>assistant") == 2  # words and calls are one message


def test_forms(client: openai.OpenAI, claude: anthropic.Anthropic, server: LiveServer) -> None:
    script(server, '{"city": "Oslo"}')
    text: Any = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(model="tiny", input="hello", text=text, max_output_tokens=50)
    assert json.loads(answer.output_text) == {"city": "Oslo"}
    first = server.engine.requests[-1].sampling.grammar
    assert first is not None
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    claude.messages.create(model="tiny", max_tokens=50, messages=HELLO, extra_body={"output_config": config})
    assert server.engine.requests[-1].sampling.grammar == first
    for wrong in ({"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}, {"type": "poem"}):
        status, error = server.post("/v1/responses", input="a", text={"format": wrong})
        assert status == 400 and error["error"]["param"] == "text.format", error
    allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    client.responses.create(model="tiny", input="hello", tools=RESPONSE_TOOLS, tool_choice=allowed,
                            max_output_tokens=1)  # fmt: skip
    assert "clock" in server.last_prompt() and "weather" not in server.last_prompt()


def test_a_tool_is_told_alike_on_every_surface() -> None:
    told = {"name": "weather", "description": "Tells the weather", "parameters": SCHEMA}
    with LiveServer(template="{{ tools[0].function | tojson }}<tool_call>", drain_timeout=0.2) as server:
        server.chat(tools=[{"type": "function", "function": told}], max_tokens=1)
        expected = server.last_prompt()
        assert expected == json.dumps(told) + "<tool_call>"
        server.post("/v1/responses", input="hello", tools=[{"type": "function", **told}], max_output_tokens=1)
        assert server.last_prompt() == expected
        tool = {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}
        server.post("/v1/messages", model="tiny", messages=HELLO, tools=[tool], max_tokens=1)
        assert server.last_prompt() == expected
