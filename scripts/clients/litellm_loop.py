"""litellm against a running server, as `hosted_vllm/`, `openai/` and `anthropic/`: streams, tools, vectors.

    pip install litellm && python litellm_loop.py URL MODEL ENCODER_URL ENCODER

Ends with an error when anything is not as it should be.
"""

import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched from elsewhere

import litellm
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris right now?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {
    "name": "get_weather",
    "description": "Get the current weather of a city.",
    "parameters": PARAMETERS,
}


class Weather(BaseModel):
    """The weather of a city."""

    degrees: int
    raining: bool


def check(given: dict[str, Any], label: str) -> None:
    """An answer, its stream, a tool loop."""
    said = litellm.completion(messages=QUESTION, **given).choices[0].message.content
    assert "Paris" in said, said
    pieces = [
        c.choices[0].delta.content or "" for c in litellm.completion(messages=QUESTION, stream=True, **given)
    ]
    assert "".join(pieces) == said and len(pieces) > 3
    tools = [{"type": "function", "function": FUNCTION}]
    forced = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    first = litellm.completion(messages=WEATHER, **forced, **given)
    message = first.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "17 degrees, rain"}
    history = [*WEATHER, message.model_dump(exclude_none=True), result]
    again = {"tools": tools} if "anthropic" in given["model"] else {}  # litellm wants them there
    second = litellm.completion(messages=history, **again, **given)
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls"), second
    print(f"{label}: {len(pieces)} pieces")


def main(url: str, model: str, encoder_url: str, encoder: str) -> None:
    """All runs."""
    common = {"api_key": "none", "temperature": 0, "max_tokens": 40, "num_retries": 0}
    vllm = {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", **common}
    check(vllm, "hosted_vllm")
    check({"model": f"openai/{model}", "api_base": f"{url}/v1", **common}, "openai")
    check({"model": f"anthropic/{model}", "api_base": url, **common}, "anthropic")
    asked = [{"role": "user", "content": "It is 17 degrees and rains. Describe the weather."}]
    told = litellm.completion(messages=asked, response_format=Weather, **vllm)
    assert Weather.model_validate_json(told.choices[0].message.content).degrees == 17
    vectors = litellm.embedding(
        f"hosted_vllm/{encoder}", ["Paris", "Bread"], api_base=f"{encoder_url}/v1", api_key="none"
    )
    assert [len(one["embedding"]) for one in vectors.data] == [384, 384]
    ranked = litellm.rerank(
        model=f"hosted_vllm/{encoder}",
        query="food",
        documents=["Paris", "Bread"],
        api_base=encoder_url,
        api_key="none",
    )
    assert ranked.results[0]["index"] == 1, ranked


main(*sys.argv[1:])
