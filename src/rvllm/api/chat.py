"""`/v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET

from rvllm.api.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    now,
)
from rvllm.api.body import parse
from rvllm.api.errors import invalid
from rvllm.api.exchange import Exchange, check_model
from rvllm.api.generation import IN_THREAD_CHARS, Job, Piece, Service
from rvllm.api.logprobs import Names, chat_logprobs, prompt_logprobs
from rvllm.api.sampling import chat_params, refuse_unsupported
from rvllm.api.schemas import ChatRequest, Message, TokenizeRequest

_ROLES = ("system", "developer", "user", "assistant", "tool")


async def chat_completions(service: Service, exchange: Exchange, body: bytes) -> None:
    """Answers a chat request, whole or as a stream."""
    request = parse(body, ChatRequest)
    check_model(request.model, service.served_name)
    refuse_unsupported(request)
    _check_tools(request)
    params = chat_params(request, service.defaults)
    tokens = await _prompt(service, request, len(body))
    job = service.job(
        f"chatcmpl-{exchange.request_id}", [tokens], params, priority=request.priority, param="messages"
    )
    answer = _Chat(service, request, job)
    if request.stream:
        await answer.stream(exchange)
    else:
        await exchange.json(await answer.whole())


async def _prompt(service: Service, request: ChatRequest, size: int) -> list[int]:
    """The conversation as token ids; a long one does not hold up the event loop."""
    if size < IN_THREAD_CHARS:
        text = render(service, request)
    else:
        text = await asyncio.to_thread(render, service, request)
    return await service.encode_prompt(text, bool(request.add_special_tokens), "messages")


def render(service: Service, request: ChatRequest | TokenizeRequest) -> str:
    """The conversation as the model's prompt, by its chat template."""
    if not request.messages:
        raise invalid("messages must not be empty", "messages")
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
    text = service.tokenizer.apply_chat_template(
        [_plain(message, i) for i, message in enumerate(request.messages)],
        tools=tools or None,
        documents=documents,
        chat_template=service.chat_template,
        add_generation_prompt=generation,
        continue_final_message=continued,
        tokenize=False,
        **variables,
    )
    assert isinstance(text, str)
    return text


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it; `developer` is today's word for `system`."""
    where = f"messages[{index}]"
    if message.role not in _ROLES:
        raise invalid(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {message.role[:40]!r}", f"{where}.role"
        )
    if message.content is None and message.role != "assistant":
        raise invalid(f"{where}.content is required", f"{where}.content")
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain["role"] = "system" if message.role == "developer" else message.role
    if message.content is None and not message.tool_calls:
        plain["content"] = ""
    return plain


def _check_tools(request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice not in (None, "auto", "none"):
        raise invalid("tool_choice: only auto and none are supported", "tool_choice", "unsupported_parameter")
    if choice == "auto" and not request.tools:
        raise invalid("tool_choice needs tools", "tool_choice")


class _Chat:
    """Turns the pieces of a job into OpenAI's objects."""

    def __init__(self, service: Service, request: ChatRequest, job: Job) -> None:
        self._service, self._request, self._job = service, request, job
        self._created = now()
        self._with_ids = bool(request.return_token_ids)
        self._names = Names(service.tokenizer, bool(request.return_tokens_as_token_ids))
        self._echo = _echoed(request)

    async def whole(self) -> ChatAnswer:
        """The finished answer."""
        count = len(self._job.choices)
        texts, ids = [[self._echo] for _ in range(count)], [list[int]() for _ in range(count)]
        logprobs = [ChatLogprobs([]) for _ in range(count)]
        choices = [ChatChoice(index=i, message=ChatMessage("assistant", "")) for i in range(count)]
        answer = ChatAnswer(id=self._job.request_id, created=self._created, model=self._service.served_name,
                            choices=choices, usage=self._job.usage())  # fmt: skip
        async with aclosing(self._service.run(self._job)) as pieces:
            async for piece in pieces:
                choice, delta = choices[piece.index], piece.delta
                texts[piece.index].append(delta.text)
                ids[piece.index] += delta.token_ids
                part = self._logprobs(piece)
                if part is not None:
                    logprobs[piece.index].content += part.content
                if piece.delta.prompt_logprobs is not None:
                    answer.prompt_logprobs = prompt_logprobs(
                        piece.delta.prompt_logprobs, self._service.tokenizer
                    )
                if delta.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        for i, choice in enumerate(choices):
            choice.message.content = "".join(texts[i])
            choice.logprobs = logprobs[i] if self._request.logprobs else None
            choice.token_ids = ids[i] if self._with_ids else UNSET
        answer.usage = self._job.usage()
        answer.prompt_token_ids = self._job.prompts[0] if self._with_ids else UNSET
        return answer

    async def stream(self, exchange: Exchange) -> None:
        """The answer as server-sent events: role first, then text as it comes, then usage if asked for."""
        options = self._request.stream_options
        running_usage = options is not None and options.include_usage and options.continuous_usage_stats
        with_usage = options is not None and options.include_usage
        started = [False] * len(self._job.choices)
        async with aclosing(self._service.run(self._job)) as pieces:
            async for piece in pieces:
                if not exchange.streaming:  # not before the first piece, so that a refusal keeps its status
                    await exchange.open_stream()
                if not started[piece.index]:
                    started[piece.index] = True
                    await exchange.event(self._opening(piece.index, with_usage))
                chunk = self._chunk(piece)
                if chunk is None:
                    continue
                if with_usage:
                    chunk.usage = self._job.usage() if running_usage else None
                await exchange.event(chunk)
        if with_usage:
            last = self._envelope([])
            last.usage = self._job.usage()
            await exchange.event(last)
        await exchange.close_stream()

    def _opening(self, index: int, with_usage: bool) -> ChatChunk:
        chunk = self._envelope([ChatChunkChoice(index=index, delta=ChatDelta("assistant", self._echo))])
        if self._with_ids:
            chunk.prompt_token_ids = self._job.prompts[0]
        if with_usage:
            chunk.usage = None
        return chunk

    def _chunk(self, piece: Piece) -> ChatChunk | None:
        """The event of a piece; None when it adds nothing to see (text held back)."""
        delta = piece.delta
        logprobs = self._logprobs(piece)
        if not (delta.text or logprobs or delta.finish_reason or (self._with_ids and delta.token_ids)):
            return None
        choice = ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(content=delta.text) if delta.text or not delta.finish_reason else ChatDelta(),
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
        )
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        if self._with_ids:
            choice.token_ids = delta.token_ids
        return self._envelope([choice])

    def _envelope(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._job.request_id, created=self._created, model=self._service.served_name, choices=choices
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        positions = piece.delta.logprobs
        if not self._request.logprobs or not positions:
            return None
        return chat_logprobs(positions, self._request.top_logprobs or 0, self._names)


def _echoed(request: ChatRequest) -> str:
    """With `echo`, the text of the final message that the answer continues."""
    last = request.messages[-1]
    if not request.echo or last.role != "assistant" or last.content is None:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in last.content)
