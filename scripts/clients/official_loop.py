"""The official `openai` and `anthropic` packages against running servers: every surface, whole and streamed.

    pip install openai anthropic && python official_loop.py URL MODEL ENCODER_URL ENCODER

Ends with an error when anything is not as it should be.
"""

import json
import sys
from typing import Any

import anthropic
import openai
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris right now?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Get the current weather of a city."}


class Weather(BaseModel):
    """The weather of a city."""

    degrees: int
    sky: str = Field(max_length=20)


def chat(client: openai.OpenAI, model: str) -> None:
    """Chat completions: an answer, its stream, a tool's result, a typed answer."""
    given: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 40}
    said = client.chat.completions.create(messages=QUESTION, **given).choices[0].message.content
    assert said and "Paris" in said, said
    stream = client.chat.completions.create(messages=QUESTION, stream=True, **given)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said
    tools = [{"type": "function", "function": {**TOOL, "parameters": PARAMETERS}}]
    forced = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    calling = client.chat.completions.create(messages=WEATHER, **forced, **given)
    (call,) = calling.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    told = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees, rain"}
    history = [*WEATHER, calling.choices[0].message, told]
    ended = client.chat.completions.create(messages=history, **given)
    assert ended.choices[0].message.content  # of so small a model, whatever it is
    asked = [{"role": "user", "content": "It is 17 degrees and rains. Describe the weather."}]
    typed = client.chat.completions.parse(messages=asked, response_format=Weather, **given)
    assert typed.choices[0].message.parsed and typed.choices[0].message.parsed.degrees == 17


def responses(client: openai.OpenAI, model: str) -> None:
    """Responses: an answer, one that follows it, events."""
    given: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 40}
    first = client.responses.create(input="What is the capital of France?", **given)
    assert "Paris" in first.output_text
    second = client.responses.create(input="And of Italy?", previous_response_id=first.id, **given)
    assert "Rome" in second.output_text, second.output_text
    with client.responses.stream(input="What is the capital of France?", **given) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(pieces) == stream.get_final_response().output_text == first.output_text


def messages(client: anthropic.Anthropic, model: str) -> None:
    """Anthropic's messages: an answer, its stream, a tool, how many tokens."""
    given: dict[str, Any] = {"model": model, "max_tokens": 40, "extra_body": {"temperature": 0}}
    said = client.messages.create(messages=QUESTION, **given)
    assert "Paris" in said.content[0].text
    with client.messages.stream(messages=QUESTION, **given) as stream:
        assert "".join(stream.text_stream) == said.content[0].text
    counted = client.messages.count_tokens(model=model, messages=QUESTION)
    found = said.usage.cache_read_input_tokens or 0  # of the prompt, which others have asked before
    assert counted.input_tokens == said.usage.input_tokens + found
    tools = [{**TOOL, "input_schema": PARAMETERS}]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    called = client.messages.create(messages=WEATHER, tools=tools, tool_choice=choice, **given)
    (use,) = [block for block in called.content if block.type == "tool_use"]
    assert use.input == {"city": "Paris"} and called.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "17 degrees, rain"}
    history = [
        *WEATHER,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    ended = client.messages.create(messages=history, **given)
    assert ended.content[0].text


def main(url: str, model: str, encoder_url: str, encoder: str) -> None:
    """All runs."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chat(client, model)
    responses(client, model)
    told = client.completions.create(
        model=model, prompt="def add(a, b):\n    return", max_tokens=8, temperature=0
    )
    assert "a + b" in told.choices[0].text
    messages(anthropic.Anthropic(base_url=url, api_key="none", max_retries=0), model)
    vectors = openai.OpenAI(base_url=f"{encoder_url}/v1", api_key="none", max_retries=0).embeddings.create(
        model=encoder, input=["Paris is a city.", "Bread is food."]
    )
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == 384
    print(f"openai {openai.__version__}, anthropic {anthropic.__version__}: fine")


main(*sys.argv[1:])
