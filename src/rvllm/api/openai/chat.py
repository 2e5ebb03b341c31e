"""`/v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from msgspec import UNSET

from rvllm.api.generate.answer import Answer, AnswerDelta
from rvllm.api.generate.conversation import prompt_of
from rvllm.api.generate.generation import Service
from rvllm.api.generate.logprobs import Names, chat_logprobs, prompt_logprobs
from rvllm.api.generate.output_parser import Call, allowed_tools
from rvllm.api.http.body import check_count
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.streaming import stream
from rvllm.api.schemas.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    Rendered,
    ToolCall,
    now,
)
from rvllm.api.schemas.requests import ChatBatchRequest, ChatRequest
from rvllm.text.tools.events import CallStart, Text


async def chat_completions(service: Service, exchange: Exchange, request: ChatRequest) -> None:
    name = f"chatcmpl-{exchange.request_id}"
    answer = await Answer.start(service, name, request, exchange.body_bytes)
    writer = _ChatWriter(service, answer)
    if request.stream:
        await writer.stream(exchange)
    else:
        await exchange.json(await writer.whole())


async def chat_batch(service: Service, exchange: Exchange, request: ChatBatchRequest) -> None:
    """`/v1/chat/completions/batch`, as vLLM has it: several conversations, a choice for each, in order.

    They are answered together; a mistake in one refuses all.
    """
    check_count(request.messages, service.config.max_choices, "messages")
    if not request.messages:
        raise invalid("messages must hold at least one conversation", "messages")
    for name, value in (("stream", request.stream), ("n", request.n not in (None, 1))):
        if value:
            raise invalid(f"{name} is not for batches: send the conversations one by one", name)
    fields = {name: getattr(request, name) for name in request.__struct_fields__ if name != "messages"}
    names = [f"chatcmpl-{exchange.request_id}-{i}" for i in range(len(request.messages))]
    answers = [
        await Answer.start(service, name, ChatRequest(messages=messages, **fields), exchange.body_bytes)
        for name, messages in zip(names, request.messages, strict=True)
    ]
    running = [asyncio.ensure_future(_ChatWriter(service, answer).whole()) for answer in answers]
    try:
        found = await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    whole = found[0]
    whole.id = f"chatcmpl-{exchange.request_id}"
    whole.choices = [answer.choices[0] for answer in found]
    for i, choice in enumerate(whole.choices):
        choice.index = i
    whole.usage.prompt_tokens = sum(answer.usage.prompt_tokens for answer in found)
    whole.usage.completion_tokens = sum(answer.usage.completion_tokens for answer in found)
    whole.usage.total_tokens = whole.usage.prompt_tokens + whole.usage.completion_tokens
    await exchange.json(whole)


async def render_chat(service: Service, exchange: Exchange, request: ChatRequest) -> None:
    """The prompt that a conversation makes, by the same way as `/v1/chat/completions`.

    llm-d's `token-producer` asks this before it routes, to look prefixes up by the engine's tokens.
    """
    request.tools, request.tool_choice = allowed_tools(request.tools, request.tool_choice)
    _, tokens = await prompt_of(service, request, exchange.body_bytes, bool(request.add_special_tokens))
    await exchange.json(Rendered(f"chatcmpl-{exchange.request_id}", service.served_name, tokens))


class _ChatWriter:
    """Writes an answer in OpenAI's objects."""

    def __init__(self, service: Service, answer: Answer) -> None:
        self._service, self._answer = service, answer
        self._request, self._job = answer.request, answer.job
        self._created = now()
        self._with_ids = bool(self._request.return_token_ids)
        self._names = Names(service.tokenizer, bool(self._request.return_tokens_as_token_ids))
        self._echo = _echoed(self._request)

    async def whole(self) -> ChatAnswer:
        count = len(self._job.choices)
        words, thoughts = [[self._echo] for _ in range(count)], [list[str]() for _ in range(count)]
        choices = [
            ChatChoice(
                index=i,
                message=ChatMessage("assistant", ""),
                logprobs=ChatLogprobs([]) if self._request.logprobs else None,
                token_ids=[] if self._with_ids else UNSET,
            )
            for i in range(count)
        ]
        whole = ChatAnswer(id=self._job.request_id, created=self._created, model=self._service.served_name,
                           choices=choices, usage=self._answer.usage)  # fmt: skip
        async with aclosing(self._answer.deltas()) as deltas:
            async for delta in deltas:
                choice = choices[delta.index]
                thoughts[delta.index].append(delta.reasoning)
                words[delta.index] += [event.text for event in delta.events if isinstance(event, Text)]
                if choice.token_ids is not UNSET:
                    choice.token_ids += delta.token_ids
                choice.logprobs = self._logprobs(delta, choice.logprobs)
                if delta.prompt_logprobs is not None:
                    whole.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs, self._service.tokenizer)
                if delta.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        for i, choice in enumerate(choices):
            choice.message = _message("".join(words[i]), "".join(thoughts[i]), self._answer.calls(i))
        whole.usage = self._answer.usage
        whole.prompt_token_ids = self._job.prompts[0] if self._with_ids else UNSET
        return whole

    async def stream(self, exchange: Exchange) -> None:
        """The answer as server-sent events: role first, then text as it comes, then usage if asked for."""
        started = [False] * len(self._job.choices)

        def events(delta: AnswerDelta) -> list[ChatChunk]:
            opening = [] if started[delta.index] else [self._opening(delta.index)]
            started[delta.index] = True
            return opening + self._chunks(delta)

        options, deltas = self._request.stream_options, self._answer.deltas()
        await stream(exchange, deltas, options, events, lambda: self._envelope([]), self._job.usage)

    def _opening(self, index: int) -> ChatChunk:
        chunk = self._envelope([ChatChunkChoice(index=index, delta=ChatDelta("assistant", self._echo))])
        if self._with_ids:
            chunk.prompt_token_ids = self._job.prompts[0]
        return chunk

    def _chunks(self, delta: AnswerDelta) -> list[ChatChunk]:
        """The events of a delta; none when it adds nothing to see."""
        logprobs = self._logprobs(delta)
        parts = _parts(delta)
        seen = logprobs or delta.finish_reason or (self._with_ids and delta.token_ids)
        if not parts and seen:
            parts = [ChatDelta() if delta.finish_reason else ChatDelta(content="")]
        elif delta.finish_reason and parts[-1].tool_calls is not UNSET:
            parts.append(ChatDelta())  # clients look for the end in a chunk of its own
        choices = [ChatChunkChoice(index=delta.index, delta=part) for part in parts]
        if not choices:
            return []
        choices[0].logprobs = logprobs
        if self._with_ids:
            choices[0].token_ids = delta.token_ids
        if delta.finish_reason is not None:
            choices[-1].finish_reason, choices[-1].stop_reason = delta.finish_reason, delta.stop_reason
        return [self._envelope([choice]) for choice in choices]

    def _envelope(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._job.request_id, created=self._created, model=self._service.served_name, choices=choices
        )

    def _logprobs(self, delta: AnswerDelta, before: ChatLogprobs | None = None) -> ChatLogprobs | None:
        """The log-probabilities that a delta adds to those before it."""
        if not self._request.logprobs or not delta.logprobs:
            return before
        return chat_logprobs(delta.logprobs, self._request.top_logprobs or 0, self._names, before)


def _parts(delta: AnswerDelta) -> list[ChatDelta]:
    """What a delta adds to the message, in order."""
    thought = delta.reasoning
    parts = [ChatDelta(reasoning=thought, reasoning_content=thought)] if thought else []
    for event in delta.events:
        if isinstance(event, Text):
            parts.append(ChatDelta(content=event.text))
        elif isinstance(event, CallStart):
            started = ToolCall(FunctionCall("", event.name), event.id or "", "function", event.index)
            parts.append(ChatDelta(tool_calls=[started]))
        else:
            more = ToolCall(FunctionCall(event.text), index=event.index)
            parts.append(ChatDelta(tool_calls=[more]))
    return parts


def _message(words: str, thoughts: str, calls: list[Call]) -> ChatMessage:
    message = ChatMessage("assistant", words)
    if thoughts:
        message.reasoning = message.reasoning_content = thoughts
    if calls:
        message.tool_calls = [
            ToolCall(FunctionCall(call.arguments, call.name), call.id, "function") for call in calls
        ]
    if not words and (thoughts or calls):
        message.content = None
    return message


def _echoed(request: ChatRequest) -> str:
    """With `echo`, the text of the final message that the answer continues."""
    last = request.messages[-1]
    if not request.echo or last.role != "assistant" or not last.content:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in last.content)
