"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec

from rvllm.api.generate.answer import Answer, AnswerDelta
from rvllm.api.generate.conversation import rendered
from rvllm.api.generate.generation import Service
from rvllm.api.http.errors import field_names
from rvllm.api.http.exchange import Exchange
from rvllm.api.schemas.answers import Usage
from rvllm.api.schemas.anthropic import (
    CHAT_NAMES,
    CountTokensRequest,
    MessageAnswer,
    MessagesRequest,
    MessageUsage,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolUseBlock,
    conversation,
    generation,
)
from rvllm.api.schemas.requests import ChatRequest
from rvllm.text.tools.events import CallStart, Event, Text

_STOPS = {"length": "max_tokens", "tool_calls": "tool_use"}


async def messages(service: Service, exchange: Exchange, request: MessagesRequest) -> None:
    """Answers with the assistant's next message, whole or as a stream of events."""
    with field_names(CHAT_NAMES, ChatRequest.__struct_fields__):
        name = f"msg_{exchange.request_id}"
        answer = await Answer.start(service, name, generation(request), exchange.body_bytes)
        writer = _Writer(exchange, request, service.served_name)
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                await writer.take(delta, answer.usage)
    await writer.finish()


async def count_tokens(service: Service, exchange: Exchange, request: CountTokensRequest) -> None:
    """Answers with the number of tokens that a request's prompt has."""
    text = await rendered(service, conversation(request), exchange.body_bytes)
    await exchange.json(TokenCount(len(await service.encode_any(text, False, "messages"))))


class _Writer:
    """Turns deltas into blocks: sends their events when streaming, keeps the blocks otherwise."""

    def __init__(self, exchange: Exchange, request: MessagesRequest, model: str) -> None:
        self._exchange, self._streaming = exchange, request.stream
        self._max_tokens = request.max_tokens
        self._answer = MessageAnswer(
            id=f"msg_{exchange.request_id}", model=model, content=[], usage=MessageUsage()
        )
        self._open = ""  # the kind of the block being written, for tools with the call's number
        self._arguments: list[str] = []
        self._started = False

    async def take(self, delta: AnswerDelta, usage: Usage) -> None:
        """Takes the next delta, and the tokens so far."""
        self._answer.usage = _usage(usage)
        await self._start()
        if delta.reasoning:
            await self._enter("thinking", ThinkingBlock(""))
            await self._add({"type": "thinking_delta", "thinking": delta.reasoning})
        for event in delta.events:
            await self._event(event)
        if delta.finish_reason is not None:
            self._stop(delta.finish_reason, delta.stop_reason)

    async def finish(self) -> None:
        """Sends the rest of the stream, or the whole message."""
        await self._leave()
        if not self._streaming:
            await self._exchange.json(self._answer)
            return
        delta = {"stop_reason": self._answer.stop_reason, "stop_sequence": self._answer.stop_sequence}
        await self._send("message_delta", delta=delta, usage=self._answer.usage)
        await self._send("message_stop")
        await self._exchange.end_stream()

    async def _start(self) -> None:
        if self._started:
            return
        self._started = True
        if self._streaming:
            usage = msgspec.structs.replace(self._answer.usage, output_tokens=0)
            opening = msgspec.structs.replace(self._answer, usage=usage, content=[])
            await self._exchange.open_stream()
            await self._send("message_start", message=opening)
            await self._send("ping")

    def _stop(self, reason: str, detail: int | str | None) -> None:
        answer = self._answer
        answer.stop_reason = _STOPS.get(reason, "end_turn")
        if reason == "length" and self._answer.usage.output_tokens < self._max_tokens:
            answer.stop_reason = "model_context_window_exceeded"
        if reason == "stop" and isinstance(detail, str):
            answer.stop_reason, answer.stop_sequence = "stop_sequence", detail

    async def _event(self, event: Event) -> None:
        if isinstance(event, Text):
            await self._enter("text", TextBlock(""))
            await self._add({"type": "text_delta", "text": event.text})
        elif isinstance(event, CallStart):
            await self._enter(f"tool {event.index}", ToolUseBlock(event.id or "", event.name, {}))
        elif event.text:
            await self._add({"type": "input_json_delta", "partial_json": event.text})

    async def _enter(self, kind: str, block: TextBlock | ThinkingBlock | ToolUseBlock) -> None:
        """Begins a block unless one of its kind is being written."""
        if self._open == kind:
            return
        await self._leave()
        self._open = kind
        self._answer.content.append(block)
        await self._send("content_block_start", index=len(self._answer.content) - 1, content_block=block)

    async def _add(self, delta: dict[str, str]) -> None:
        block = self._answer.content[-1]
        if isinstance(block, ToolUseBlock):
            self._arguments.append(delta["partial_json"])
        elif not self._streaming and isinstance(block, TextBlock):
            block.text += delta["text"]
        elif not self._streaming and isinstance(block, ThinkingBlock):
            block.thinking += delta["thinking"]
        await self._send("content_block_delta", index=len(self._answer.content) - 1, delta=delta)

    async def _leave(self) -> None:
        if not self._open:
            return
        block = self._answer.content[-1]
        if isinstance(block, ToolUseBlock):
            block.input = _arguments("".join(self._arguments))
            self._arguments.clear()
        self._open = ""
        await self._send("content_block_stop", index=len(self._answer.content) - 1)

    async def _send(self, kind: str, **fields: Any) -> None:
        if self._streaming:
            await self._exchange.event({"type": kind, **fields}, kind)


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; a call that max_tokens cut off has none."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _usage(usage: Usage) -> MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)
