"""LlamaIndex against running servers: chat, streams, an agent with a tool, typed answers, retrieval.

    pip install llama-index-core llama-index-llms-openai-like llama-index-embeddings-openai-like
    python llama_index_loop.py URL MODEL ENCODER_URL ENCODER

Ends with an error when anything is not as it should be.
"""

import asyncio
import sys

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

QUESTION = [ChatMessage(role="user", content="What is the capital of France?")]
called: list[str] = []


class Weather(BaseModel):
    """The weather of a city."""

    degrees: int
    raining: bool


def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    called.append(city)
    return "17 degrees, rain"


async def main(url: str, model: str, encoder_url: str, encoder: str) -> None:
    """All runs."""
    llm = OpenAILike(
        model=model, api_base=f"{url}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
        temperature=0, max_tokens=60, max_retries=0, should_use_structured_outputs=True, context_window=4096,
    )  # fmt: skip
    said = llm.chat(QUESTION).message.content or ""
    assert "Paris" in said
    assert "".join(piece.delta or "" for piece in llm.stream_chat(QUESTION)) == said
    # A small model calls on and on; `return_direct` ends the loop with what the tool gave.
    tool = FunctionTool.from_defaults(get_weather, return_direct=True)
    agent = FunctionAgent(tools=[tool], llm=llm, system_prompt="You are helpful.")
    answer = await agent.run("What is the weather in Paris right now?")
    assert called == ["Paris"] and "17 degrees" in str(answer), (called, answer)
    typed = llm.as_structured_llm(Weather).chat(
        [ChatMessage(role="user", content="It is 17 degrees and rains. Describe the weather.")]
    )
    assert typed.raw.degrees == 17, typed
    embedding = OpenAILikeEmbedding(model_name=encoder, api_base=f"{encoder_url}/v1", api_key="none")
    texts = ["Paris is the capital of France.", "Bread is made of flour and water."]
    index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedding)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("What is bread made of?")
    assert found.text == texts[1]
    answer = index.as_query_engine(llm=llm, similarity_top_k=1).query("What is bread made of?")
    assert "flour" in str(answer).lower(), answer
    print(f"chat, stream, agent, typed answer, retrieval: {str(answer)!r}")


asyncio.run(main(*sys.argv[1:]))
