# ruff: noqa: E501
"""Tools and forms against Qwen2.5-Coder-0.5B, served as a user serves it, through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from support.clients.served import Served
from support.models.fetched import model_path

pytestmark = [pytest.mark.models, pytest.mark.timeout(400)]

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city's name"}},
            "required": ["city"],
        },
    },
}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris right now?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    flags = ("--served-model-name", "qwen", "--max-model-len", "1024", "--device", "cpu")
    patient = ("--worker-timeout", "60")  # a busy machine takes its time with the first grammar
    model = ("--model", str(model_path("qwen2.5-coder-0.5b")), "--kv-cache-memory-gb", "0.05")
    with Served(*model, *flags, *patient) as served, served.openai() as made:
        yield made


def streamed(
    client: openai.OpenAI, messages: list[Any], **extra: Any
) -> tuple[str, dict[int, dict[str, str]], str]:
    """(words, calls by index, finish reason) of a streamed answer."""
    words, calls, finish = "", {}, ""
    for chunk in client.chat.completions.create(model="qwen", messages=messages, stream=True, **extra):
        choice = chunk.choices[0]
        words += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += part.id or ""
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
        finish = choice.finish_reason or finish
    return words, calls, finish


def test_the_tool_loop(client: openai.OpenAI) -> None:
    words, calls, finish = streamed(
        client, QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_tokens=80,
    )  # fmt: skip
    assert (words, finish, len(calls)) == ("", "tool_calls", 1)
    call = calls[0]
    assert call["name"] == "get_weather" and "Paris" in json.loads(call["arguments"])["city"]
    made = {
        "id": call["id"],
        "type": "function",
        "function": {"name": call["name"], "arguments": call["arguments"]},
    }
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {
            "role": "tool",
            "tool_call_id": call["id"],
            "content": '{"temperature": "17 degrees", "sky": "rain"}',
        },
    ]
    # So small a model calls again and again as long as it may, so it may not, and has to answer in a form.
    schema = {
        "type": "object",
        "properties": {"degrees": {"type": "integer"}, "sky": {"type": "string", "maxLength": 20}},
        "required": ["degrees", "sky"],
        "additionalProperties": False,
    }
    words, calls, finish = streamed(
        client, messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}},
    )  # fmt: skip
    assert (calls, finish, json.loads(words)) == ({}, "stop", {"degrees": 17, "sky": "rain"})


def test_a_call_where_nothing_forces_it(client: openai.OpenAI) -> None:
    words, calls, finish = streamed(client, QUESTION, tools=[WEATHER], temperature=0, max_tokens=60)
    assert (words, finish, len(calls)) == ("", "tool_calls", 1)
    assert json.loads(calls[0]["arguments"]) == {"city": "Paris"}


def test_a_named_function_is_called_whatever_the_question(client: openai.OpenAI) -> None:
    pick: Any = {
        "type": "function",
        "function": {
            "name": "pick",
            "parameters": {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 1, "maximum": 3}},
                "required": ["colour", "count"],
                "additionalProperties": False,
            },
        },
    }  # fmt: skip
    answer = client.chat.completions.create(
        model="qwen", messages=QUESTION, tools=[WEATHER, pick], temperature=1.3, seed=3, max_tokens=120,
        tool_choice={"type": "function", "function": {"name": "pick"}}, n=3,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.message.tool_calls is not None and len(choice.message.tool_calls) == 1
        (call,) = choice.message.tool_calls
        assert call.type == "function" and call.function.name == "pick"
        jsonschema.validate(json.loads(call.function.arguments), pick["function"]["parameters"])


def test_answers_take_the_form_asked_for(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "capital": {"type": "string", "maxLength": 20},
            "population_millions": {"type": "number", "minimum": 0, "maximum": 100},
        },
        "required": ["capital", "population_millions"],
        "additionalProperties": False,
    }
    messages: list[Any] = [{"role": "user", "content": "Describe France as JSON."}]
    answer = client.chat.completions.create(
        model="qwen", messages=messages, temperature=0, max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "country", "strict": True, "schema": schema}},
    )  # fmt: skip
    value = json.loads(answer.choices[0].message.content or "")
    jsonschema.validate(value, schema)
    assert value["capital"] == "Paris" and answer.choices[0].finish_reason == "stop"
    picked = client.chat.completions.create(
        model="qwen", messages=[{"role": "user", "content": "Is fire hot?"}], temperature=0,
        extra_body={"guided_choice": ["yes", "no"]},
    )  # fmt: skip
    assert picked.choices[0].message.content == "yes"


def test_a_wrong_schema_is_a_400_with_its_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="strin") as caught:
        client.chat.completions.create(
            model="qwen", messages=QUESTION,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}},
        )  # fmt: skip
    assert caught.value.param == "response_format"


def test_a_gap_is_filled(client: openai.OpenAI) -> None:
    before, after = "def add(a, b):\n    ", "\n\nassert add(2, 3) == 5\n"
    filled = client.completions.create(
        model="qwen", prompt=before, suffix=after, max_tokens=24, temperature=0
    )
    assert filled.choices[0].text.strip().splitlines()[0] == "return a + b"
    with_stream = client.completions.create(
        model="qwen", prompt=before, suffix=after, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in with_stream) == filled.choices[0].text
