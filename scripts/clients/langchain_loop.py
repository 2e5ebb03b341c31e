"""LangChain and LangGraph against a running server: a tool loop, streams, typed answers.

    pip install langchain-openai langgraph && python langchain_loop.py BASE_URL MODEL

Over chat completions and over responses. Ends with an error when anything is not as it should be.
"""

import sys
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import BaseModel, Field

QUESTION = "What is the weather in Paris right now?"


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"It is 17 degrees and rains in {city}."


class Weather(BaseModel):
    """The weather of a city."""

    degrees: int
    sky: str = Field(max_length=20)


def loop(model: ChatOpenAI) -> Any:
    """A graph that calls the tool once and then answers without it, since a small model calls on and on."""
    calling, answering = model.bind_tools([get_weather], parallel_tool_calls=False), model

    def ask(state: MessagesState) -> dict[str, Any]:
        done = isinstance(state["messages"][-1], ToolMessage)
        return {"messages": [(answering if done else calling).invoke(state["messages"])]}

    def following(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    graph = StateGraph(MessagesState)
    graph.add_node("ask", ask)
    graph.add_node("tools", ToolNode([get_weather]))
    graph.add_edge(START, "ask")
    graph.add_conditional_edges("ask", following)
    graph.add_edge("tools", "ask")
    return graph.compile()


def check(model: ChatOpenAI, label: str) -> None:
    """The loop, whole and streamed, and typed answers."""
    messages = loop(model).invoke({"messages": [("user", QUESTION)]})["messages"]
    assert [type(one).__name__ for one in messages] == [
        "HumanMessage",
        "AIMessage",
        "ToolMessage",
        "AIMessage",
    ]
    assert messages[1].tool_calls[0]["args"] == {"city": "Paris"}
    pieces = [
        piece
        for piece, _ in loop(model).stream({"messages": [("user", QUESTION)]}, stream_mode="messages")
        if isinstance(piece, AIMessageChunk)
    ]
    assert len(pieces) > 8
    arguments = "".join(chunk["args"] or "" for piece in pieces for chunk in piece.tool_call_chunks)
    assert arguments == '{"city": "Paris"}', arguments
    said = model.invoke("What is the capital of France?")
    assert isinstance(said, AIMessage) and "Paris" in said.text and said.usage_metadata["output_tokens"] > 3
    assert "".join(piece.text for piece in model.stream("What is the capital of France?")) == said.text
    for method in ("json_schema", "function_calling"):
        typed = model.with_structured_output(Weather, method=method)
        told = typed.invoke("It is 17 degrees and rains. Describe the weather.")
        assert isinstance(told, Weather) and told.degrees == 17, told
    print(f"{label}: {len(pieces)} pieces streamed, {messages[-1].text!r}")


def main(base_url: str, name: str) -> None:
    """All runs."""
    given = {"model": name, "base_url": base_url, "api_key": "none", "temperature": 0, "max_retries": 0}
    for responses in (False, True):
        model = ChatOpenAI(**given, max_tokens=80, use_responses_api=responses)
        check(model, "responses" if responses else "chat")
    assert "a + b" in OpenAI(**given, max_tokens=8).invoke("def add(a, b):\n    return")


main(*sys.argv[1:])
