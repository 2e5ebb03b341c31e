"""Pydantic AI against a running server: its loop, its tools, its typed and streamed outputs.

    pip install "pydantic-ai-slim[openai]" && python pydantic_ai_loop.py BASE_URL MODEL

Outputs as a tool's arguments and as the form of the answer, over chat completions and over responses, whole
and streamed. Ends with an error when anything is not as it should be.
"""

import asyncio
import sys

from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition


class Weather(BaseModel):
    """The weather of a city, as the user is told it."""

    model_config = ConfigDict(extra="forbid")
    degrees: int
    sky: str = Field(max_length=20)


async def not_yet_called(context: RunContext[list[str]], tool: ToolDefinition) -> ToolDefinition | None:
    """So small a model calls a tool again and again as long as it is there."""
    return None if context.deps else tool


def agent_of(model: object, output: object) -> Agent[list[str], Weather]:
    """An agent with one tool."""
    settings = {"temperature": 0.0, "max_tokens": 80, "parallel_tool_calls": False}
    agent = Agent(model, output_type=output, deps_type=list[str], model_settings=settings, retries=0)

    @agent.tool(prepare=not_yet_called)
    async def get_weather(context: RunContext[list[str]], city: str) -> str:
        """Get the current weather of a city."""
        context.deps.append(city)
        return '{"degrees": 17, "sky": "rain"}'

    return agent


async def run(agent: Agent[list[str], Weather], label: str) -> None:
    """The loop, whole and streamed."""
    question, wanted = "What is the weather in Paris right now?", Weather(degrees=17, sky="rain")
    called: list[str] = []
    result = await agent.run(question, deps=called)
    assert (called, result.output) == (["Paris"], wanted), (called, result.output)
    parts = [part for message in result.all_messages() for part in message.parts]
    assert any(isinstance(part, ToolCallPart) for part in parts)
    assert any(isinstance(part, ToolReturnPart) for part in parts)
    called, steps = [], 0
    async with agent.run_stream(question, deps=called) as stream:
        async for _ in stream.stream_output(debounce_by=None):
            steps += 1
        assert await stream.get_output() == wanted
    assert called == ["Paris"] and steps > 2, (called, steps)
    print(f"{label}: {result.output!r}, {steps} partial outputs streamed")


async def main(base_url: str, name: str) -> None:
    """All runs."""
    provider = OpenAIProvider(base_url=base_url, api_key="none")
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        for output in (ToolOutput(Weather, name="tell"), NativeOutput(Weather)):
            label = f"{kind.__name__} {type(output).__name__}"
            await run(agent_of(kind(name, provider=provider), output), label)


asyncio.run(main(*sys.argv[1:]))
