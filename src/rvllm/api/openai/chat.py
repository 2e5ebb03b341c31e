"""`/v1/chat/completions`: a conversation in, the assistant's next message out."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET

from rvllm.api.generate.generation import Service, off_loop
from rvllm.api.generate.job import Job, Piece
from rvllm.api.generate.logprobs import Names, chat_logprobs, prompt_logprobs
from rvllm.api.generate.output_parser import Call, PartsReader, ToolPlan, marks_are_special, tool_plan
from rvllm.api.generate.sampling import chat_params, refuse_unsupported
from rvllm.api.generate.streaming import stream
from rvllm.api.generate.structured_outputs import answer_grammar
from rvllm.api.http.body import MAX_MESSAGES, check_count, parse
from rvllm.api.http.errors import invalid
from rvllm.api.http.exchange import Exchange, check_model
from rvllm.api.schemas.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    ToolCall,
    now,
)
from rvllm.api.schemas.requests import ChatRequest, Message, TokenizeRequest
from rvllm.text.chat.reasoning import ReasoningSplitter, opened_by
from rvllm.text.tools.events import CallStart, Event, Text

ROLES = ("system", "developer", "user", "assistant", "tool")


async def chat_completions(service: Service, exchange: Exchange, body: bytes) -> None:
    """Answers a chat request, whole or as a stream."""
    request = parse(body, ChatRequest)
    check_model(request.model, service.served_name)
    refuse_unsupported(request)
    plan = tool_plan(service, request.tools, request.tool_choice, request.parallel_tool_calls)
    params = chat_params(request, service.defaults)
    text = await rendered(service, request, len(body))
    thinks = None if service.reasoning is None else opened_by(text, service.reasoning)
    params.grammar = await answer_grammar(service, request, plan, thinks)
    if marks_are_special(service, plan):
        params.skip_special_tokens = False
    tokens = await service.encode_prompt(text, bool(request.add_special_tokens), "messages")
    job = service.job(
        f"chatcmpl-{exchange.request_id}", [tokens], params, priority=request.priority, param="messages"
    )
    answer = _Chat(service, request, job, plan, thinks)
    if request.stream:
        await answer.stream(exchange)
    else:
        await exchange.json(await answer.whole())


async def rendered(service: Service, request: ChatRequest | TokenizeRequest, size: int) -> str:
    """The conversation as a prompt. size: of the body, in bytes; a large one is rendered in a thread."""
    return await off_loop(size, render, service, request)


def render(service: Service, request: ChatRequest | TokenizeRequest) -> str:
    """The conversation as the model's prompt, by its chat template."""
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
    if message.role not in ROLES:
        raise invalid(
            f"{where}.role must be one of {', '.join(ROLES)}, got {message.role[:40]!r}", f"{where}.role"
        )
    if (message.content is None or message.content is UNSET) and message.role != "assistant":
        raise invalid(f"{where}.content is required", f"{where}.content")
    plain: dict[str, Any] = msgspec.to_builtins(message)
    plain["role"] = "system" if message.role == "developer" else message.role
    if not message.tool_calls:  # an empty list of calls is none; templates look for the field
        plain.pop("tool_calls", None)
    return plain


class _Chat:
    """Turns the pieces of a job into OpenAI's objects."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        job: Job,
        plan: ToolPlan | None,
        thinks: bool | None,
    ) -> None:
        self._service, self._request, self._job = service, request, job
        self._readers = [PartsReader(self._splitter(thinks), plan) for _ in job.choices]
        self._created = now()
        self._with_ids = bool(request.return_token_ids)
        self._names = Names(service.tokenizer, bool(request.return_tokens_as_token_ids))
        self._echo = _echoed(request)

    async def whole(self) -> ChatAnswer:
        """The finished answer."""
        count = len(self._job.choices)
        words, ids = [[self._echo] for _ in range(count)], [list[int]() for _ in range(count)]
        thoughts: list[list[str]] = [[] for _ in range(count)]
        logprobs = [ChatLogprobs([]) for _ in range(count)]
        choices = [ChatChoice(index=i, message=ChatMessage("assistant", "")) for i in range(count)]
        answer = ChatAnswer(id=self._job.request_id, created=self._created, model=self._service.served_name,
                            choices=choices, usage=self._job.usage())  # fmt: skip
        async with aclosing(self._service.run(self._job)) as pieces:
            async for piece in pieces:
                choice, delta = choices[piece.index], piece.delta
                thought, events = self._read(piece)
                thoughts[piece.index].append(thought)
                words[piece.index] += [event.text for event in events if isinstance(event, Text)]
                ids[piece.index] += delta.token_ids
                part = self._logprobs(piece)
                if part is not None:
                    logprobs[piece.index].content += part.content
                if piece.delta.prompt_logprobs is not None:
                    answer.prompt_logprobs = prompt_logprobs(
                        piece.delta.prompt_logprobs, self._service.tokenizer
                    )
                if delta.finish_reason is not None:
                    reader = self._readers[piece.index]
                    choice.finish_reason = reader.finish_reason(delta.finish_reason)
                    choice.stop_reason = delta.stop_reason
        for i, choice in enumerate(choices):
            choice.message = self._message("".join(words[i]), "".join(thoughts[i]), self._readers[i].calls)
            choice.logprobs = logprobs[i] if self._request.logprobs else None
            choice.token_ids = ids[i] if self._with_ids else UNSET
        answer.usage = self._job.usage()
        answer.prompt_token_ids = self._job.prompts[0] if self._with_ids else UNSET
        return answer

    async def stream(self, exchange: Exchange) -> None:
        """The answer as server-sent events: role first, then text as it comes, then usage if asked for."""
        started = [False] * len(self._job.choices)

        def events(piece: Piece) -> list[ChatChunk]:
            opening = [] if started[piece.index] else [self._opening(piece.index)]
            started[piece.index] = True
            return opening + self._chunks(piece)

        options = self._request.stream_options
        await stream(self._service, exchange, self._job, options, events, lambda: self._envelope([]))

    def _opening(self, index: int) -> ChatChunk:
        chunk = self._envelope([ChatChunkChoice(index=index, delta=ChatDelta("assistant", self._echo))])
        if self._with_ids:
            chunk.prompt_token_ids = self._job.prompts[0]
        return chunk

    def _chunks(self, piece: Piece) -> list[ChatChunk]:
        """The events of a piece; none when it adds nothing to see (text held back)."""
        delta = piece.delta
        logprobs = self._logprobs(piece)
        deltas = self._deltas(piece)
        seen = logprobs or delta.finish_reason or (self._with_ids and delta.token_ids)
        if not deltas and seen:
            deltas = [ChatDelta() if delta.finish_reason else ChatDelta(content="")]
        elif delta.finish_reason and deltas[-1].tool_calls is not UNSET:
            deltas.append(ChatDelta())  # clients look for the end in a chunk of its own
        choices = [ChatChunkChoice(index=piece.index, delta=each) for each in deltas]
        if not choices:
            return []
        choices[0].logprobs = logprobs
        if self._with_ids:
            choices[0].token_ids = delta.token_ids
        if delta.finish_reason is not None:
            choices[-1].finish_reason = self._readers[piece.index].finish_reason(delta.finish_reason)
            choices[-1].stop_reason = delta.stop_reason
        return [self._envelope([choice]) for choice in choices]

    def _deltas(self, piece: Piece) -> list[ChatDelta]:
        """What a piece adds to the message, in order."""
        thought, events = self._read(piece)
        deltas = [ChatDelta(reasoning_content=thought)] if thought else []
        for event in events:
            if isinstance(event, Text):
                deltas.append(ChatDelta(content=event.text))
            elif isinstance(event, CallStart):
                call = self._readers[piece.index].calls[event.index]
                started = ToolCall(FunctionCall("", call.name), call.id, "function", event.index)
                deltas.append(ChatDelta(tool_calls=[started]))
            else:
                more = ToolCall(FunctionCall(event.text), index=event.index)
                deltas.append(ChatDelta(tool_calls=[more]))
        return deltas

    def _read(self, piece: Piece) -> tuple[str, list[Event]]:
        """(thoughts, what else) that a piece adds; thoughts are dropped when they are not wanted."""
        reader = self._readers[piece.index]
        thought, events = reader.feed(piece.delta.text, piece.delta.finish_reason is not None)
        return ("" if self._request.include_reasoning is False else thought), events

    def _splitter(self, thinks: bool | None) -> ReasoningSplitter | None:
        if thinks is None or self._service.reasoning is None:
            return None
        return ReasoningSplitter(self._service.reasoning, thinks)

    def _message(self, words: str, thoughts: str, calls: list[Call]) -> ChatMessage:
        message = ChatMessage("assistant", words)
        if thoughts:
            message.reasoning_content = thoughts
        if calls:
            message.tool_calls = [
                ToolCall(FunctionCall(call.arguments, call.name), call.id, "function") for call in calls
            ]
        if not words and (thoughts or calls):
            message.content = None
        return message

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
    if not request.echo or last.role != "assistant" or not last.content or last.content is UNSET:
        return ""
    if isinstance(last.content, str):
        return last.content
    return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in last.content)
