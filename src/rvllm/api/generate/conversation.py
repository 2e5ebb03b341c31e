"""A conversation on its way in: the request of every surface is a `ChatRequest` first, then a prompt."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from rvllm.api.generate.generation import Service, too_long
from rvllm.api.http.body import MAX_MESSAGES, check_count
from rvllm.api.http.errors import invalid
from rvllm.api.schemas.requests import ChatRequest, Message, TokenizeRequest
from rvllm.text.tokenizers.tokenizer import Tokenizer
from rvllm.text.worker import tasks

ROLES = ("system", "developer", "user", "assistant", "tool")


async def rendered(service: Service, request: ChatRequest | TokenizeRequest, size: int) -> str:
    """The conversation as the model's prompt, by its chat template. size: of the body, in bytes."""
    return await service.work.run(Tokenizer.render, "messages", size, *_template_values(service, request))


async def prompt_of(
    service: Service, request: ChatRequest, size: int, add_special_tokens: bool
) -> tuple[str, list[int]]:
    """The prompt as text and as token ids. Raises a 400 for one that cannot fit into the context."""
    facts, values = service.ready.facts, _template_values(service, request)
    text, tokens = await service.work.run(
        tasks.prompt, "messages", size, *values, add_special_tokens, facts.max_model_len
    )
    if tokens is None:
        raise too_long("messages", f"{len(text)} characters", facts)
    return text, tokens


def _template_values(
    service: Service, request: ChatRequest | TokenizeRequest
) -> tuple[str | None, list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(template, messages, options, variables) for the tasks that render. Raises a 400."""
    if not request.messages:
        raise invalid("messages must not be empty", "messages")
    check_count(request.messages, MAX_MESSAGES, "messages")
    continued = bool(request.continue_final_message)
    generation = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    if continued and generation:
        raise invalid("continue_final_message excludes add_generation_prompt", "continue_final_message")
    variables = dict(request.chat_template_kwargs or {})
    taken = {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
             "continue_final_message", "tokenize"} & variables.keys()  # fmt: skip
    if taken:
        raise invalid(f"chat_template_kwargs must not set {min(taken)}", "chat_template_kwargs")
    tools, documents = request.tools, None
    if isinstance(request, ChatRequest):
        documents = request.documents
        if request.tool_choice == "none":
            tools = None
        if request.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", request.reasoning_effort)
    options = {
        "tools": tools or None,
        "documents": documents,
        "add_generation_prompt": generation,
        "continue_final_message": continued,
    }
    messages = [_plain(message, i) for i, message in enumerate(request.messages)]
    return service.chat_template, messages, options, variables


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it; `developer` is today's word for `system`."""
    where = f"messages[{index}]"
    if message.role not in ROLES:
        raise invalid(
            f"{where}.role must be one of {', '.join(ROLES)}, got {message.role[:40]!r}", f"{where}.role"
        )
    empty = message.content is None or message.content is UNSET
    if empty and message.role not in ("assistant", "tool"):
        raise invalid(f"{where}.content is required", f"{where}.content")
    plain: dict[str, Any] = msgspec.to_builtins(message)
    if empty and message.role == "tool":  # of a function that gives nothing back
        plain["content"] = ""
    plain["role"] = "system" if message.role == "developer" else message.role
    if not message.tool_calls:  # an empty list of calls is none; templates look for the field
        plain.pop("tool_calls", None)
    return plain
