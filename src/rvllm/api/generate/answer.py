"""The one answer stream: a conversation in, what the model makes of it out, typed, for every surface.

A surface turns its request into a `ChatRequest`, starts an `Answer` and writes the deltas in its own shape.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from rvllm.api.generate.conversation import prompt_of
from rvllm.api.generate.generation import Service
from rvllm.api.generate.job import Job
from rvllm.api.generate.output_parser import (
    Call,
    OutputParser,
    ToolPlan,
    allowed_tools,
    marks_are_special,
    tool_plan,
)
from rvllm.api.generate.sampling import chat_params, refuse_unsupported
from rvllm.api.generate.structured_outputs import answer_grammar
from rvllm.api.schemas.answers import CompletionDetails, Usage
from rvllm.api.schemas.requests import ChatRequest
from rvllm.backends.base import TokenLogprobs
from rvllm.text.chat.reasoning import ReasoningSplitter, begins_within
from rvllm.text.tools.events import Event


@dataclass(slots=True)
class AnswerDelta:
    """What one step of the engine added to one choice; it may add nothing to see (text held back).

    reasoning comes before events: text, starts of tool calls (with their ids) and pieces of arguments.
    finish_reason: in OpenAI's words, "tool_calls" for a stop after calls; None while more is to come.
    """

    index: int
    reasoning: str
    events: list[Event]
    token_ids: list[int]
    logprobs: Sequence[TokenLogprobs] | None
    prompt_logprobs: Sequence[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Answer:
    """A conversation's answer while it is made; `deltas` may be read once."""

    def __init__(
        self, service: Service, request: ChatRequest, job: Job, plan: ToolPlan | None, thinks: bool | None
    ) -> None:
        self.request, self.job = request, job
        self._service = service
        style = None if thinks is None else service.reasoning
        splitters = [ReasoningSplitter(style, bool(thinks)) if style else None for _ in job.choices]
        self._parsers = [OutputParser(splitter, plan) for splitter in splitters]

    @staticmethod
    async def start(service: Service, name: str, request: ChatRequest, size: int) -> Answer:
        """Checks a request, makes its prompt and hands it over; nothing runs before `deltas` is read.

        name: the answer's id. size: of the body in bytes; a large conversation is rendered in a thread.
        Raises ApiError.
        """
        refuse_unsupported(request)
        request.tools, request.tool_choice = allowed_tools(request.tools, request.tool_choice)
        plan = tool_plan(service, request.tools, request.tool_choice, request.parallel_tool_calls)
        params = chat_params(request, service.defaults)
        text, tokens = await prompt_of(service, request, size, bool(request.add_special_tokens))
        thinks = begins_within(text, service.reasoning)
        params.grammar = await answer_grammar(service, request, plan, thinks)
        await service.tokenise_bad_words(params)
        if marks_are_special(service, plan):
            params.skip_special_tokens = False
        job = service.job(name, [tokens], params, request, "messages")
        return Answer(service, request, job, plan, thinks)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        usage = self.job.usage()
        if any(parser.thoughts is not None for parser in self._parsers):
            usage.completion_tokens_details = CompletionDetails(
                sum(parser.reasoning_tokens for parser in self._parsers)
            )
        return usage

    def calls(self, index: int) -> list[Call]:
        """The tool calls of a choice so far."""
        return self._parsers[index].calls

    async def deltas(self) -> AsyncGenerator[AnswerDelta, None]:
        """What all choices add, as it comes. Closing it aborts what still runs.

        Raises ApiError when the engine ends a choice with an error, EngineDeadError when it dies.
        """
        async with aclosing(self._service.run(self.job)) as pieces:
            async for piece in pieces:
                delta, parser = piece.delta, self._parsers[piece.index]
                reasoning, events = parser.feed(
                    delta.text, delta.finish_reason is not None, len(delta.token_ids)
                )
                yield AnswerDelta(
                    piece.index,
                    "" if self.request.include_reasoning is False else reasoning,
                    events,
                    delta.token_ids,
                    delta.logprobs,
                    delta.prompt_logprobs,
                    parser.finish_reason(delta.finish_reason),
                    delta.stop_reason,
                )
