"""`/v1/completions/render` and `/v1/chat/completions/render`: what a request's prompt is, and nothing runs.

llm-d's `token-producer` asks this before it routes, so that prefixes are looked up by the engine's tokens.
"""

from __future__ import annotations

from rvllm.api.generate.conversation import prompt_of
from rvllm.api.generate.generation import Service
from rvllm.api.generate.output_parser import allowed_tools
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.completions import prompts_of
from rvllm.api.schemas.answers import Rendered
from rvllm.api.schemas.requests import ChatRequest, CompletionRequest


async def render_chat(service: Service, exchange: Exchange, request: ChatRequest) -> None:
    """The prompt that a conversation makes, by the same way as `/v1/chat/completions`."""
    request.tools, request.tool_choice = allowed_tools(request.tools, request.tool_choice)
    _, tokens = await prompt_of(service, request, exchange.body_bytes, bool(request.add_special_tokens))
    await exchange.json(Rendered(f"chatcmpl-{exchange.request_id}", service.served_name, tokens))


async def render_completion(service: Service, exchange: Exchange, request: CompletionRequest) -> None:
    """The prompts of a completion, in order; a list for one too."""
    name = f"cmpl-{exchange.request_id}"
    prompts = await prompts_of(service, request)
    await exchange.json(
        [Rendered(f"{name}-{i}", service.served_name, tokens) for i, tokens in enumerate(prompts)]
    )
