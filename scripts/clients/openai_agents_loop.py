"""The OpenAI Agents SDK against a running server: its loop, its tools, its streams.

    pip install openai-agents && python openai_agents_loop.py BASE_URL MODEL

The agent has to call a tool, then answers in a form of its own. Over both of the SDK's ways to a model, chat
completions and responses, whole and streamed. Ends with an error when anything is not as it should be.
"""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunContextWrapper,
    Runner,
    ToolCallItem,
    ToolCallOutputItem,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field

called: list[str] = []


def not_yet_called(context: RunContextWrapper, agent: object) -> bool:
    """So small a model calls a tool again and again as long as it is there."""
    return not called


@function_tool(is_enabled=not_yet_called)
def get_weather(city: str) -> str:
    """Get the current weather of a city.

    Args:
        city: The city's name
    """
    called.append(city)
    return '{"degrees": 17, "sky": "rain"}'


class Weather(BaseModel):
    """What the agent answers."""

    model_config = ConfigDict(extra="forbid")
    degrees: int
    sky: str = Field(max_length=20)


async def run(model: object, choice: str | None, streamed: bool) -> None:
    """One run of the loop."""
    called.clear()
    settings = ModelSettings(temperature=0, max_tokens=80, tool_choice=choice, parallel_tool_calls=False)
    agent = Agent(
        name="Forecaster",
        instructions="You are a helpful assistant.",
        model=model,
        tools=[get_weather],
        output_type=Weather,
        model_settings=settings,
    )
    question = "What is the weather in Paris right now?"
    kinds: list[str] = []
    if streamed:
        result = Runner.run_streamed(agent, question, max_turns=4)
        async for event in result.stream_events():
            kinds.append(event.data.type if event.type == "raw_response_event" else event.type)
    else:
        result = await Runner.run(agent, question, max_turns=4)
    assert called == ["Paris"], called
    assert result.final_output == Weather(degrees=17, sky="rain"), result.final_output
    assert [type(item) for item in result.new_items[:2]] == [ToolCallItem, ToolCallOutputItem]
    if streamed:
        assert kinds.count("response.function_call_arguments.delta") > 1, kinds
        assert kinds.count("response.output_text.delta") > 1, kinds
    print(f"{type(model).__name__:28} tool_choice={choice} streamed={streamed}: {result.final_output!r}")


async def main(base_url: str, name: str) -> None:
    """All runs."""
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        for choice in (None, "required", "get_weather"):
            for streamed in (False, True):
                await run(kind(model=name, openai_client=client), choice, streamed)


asyncio.run(main(*sys.argv[1:]))
