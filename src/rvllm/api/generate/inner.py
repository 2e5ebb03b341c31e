"""The chat endpoint as other surfaces use it: a request goes in as a body, its chunks come out as structs.

Anthropic's messages, OpenAI's responses and batches are all answered through the endpoints they have
in common, so that what is accepted, refused and computed is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from rvllm.api.generate.generation import Service
from rvllm.api.http.errors import ApiError, from_rvllm
from rvllm.api.http.exchange import Exchange
from rvllm.api.openai.chat import chat_completions
from rvllm.api.schemas.requests import ChatRequest
from rvllm.errors import RvllmError

OnEvent = Callable[[Any], Awaitable[None]]


class Inner(Exchange):
    """A request that did not come over the wire; its answer is kept, its events are handed on."""

    def __init__(self, request_id: str, on_event: OnEvent | None = None) -> None:
        super().__init__({"type": "http", "method": "POST", "headers": []}, _nothing, _nowhere)
        self.request_id = request_id
        self.answer: Any = None  # the struct or dict that a whole answer consists of
        self._on_event = on_event

    async def json(
        self, value: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        """Keeps the answer."""
        self.answer, self.status = value, status

    async def open_stream(self) -> None:
        """Notes that events follow."""
        self.status, self.streaming = 200, True

    async def event(self, value: Any, name: str | None = None) -> None:
        """Hands an event on."""
        assert self._on_event is not None
        await self._on_event(value)

    async def close_stream(self) -> None:
        """Nothing is left to do."""


class CalledFunction(msgspec.Struct):
    """A piece of a call: the name comes once, the arguments in parts."""

    name: str | None = None
    arguments: str | None = None


class CallDelta(msgspec.Struct):
    """A piece of tool call number `index`; the id comes once."""

    index: int = 0
    id: str | None = None
    function: CalledFunction | None = None


class SeenDelta(msgspec.Struct):
    """What a chunk adds to the answer."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallDelta] | None = None


class SeenLogprobs(msgspec.Struct):
    """Log-probabilities of a chunk's tokens, as the chat endpoint writes them."""

    content: list[dict[str, Any]] | None = None


class SeenChoice(msgspec.Struct):
    """The only choice of a chunk."""

    delta: SeenDelta
    logprobs: SeenLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class SeenDetails(msgspec.Struct):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int = 0


class SeenUsage(msgspec.Struct):
    """Tokens so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: SeenDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens came from the prefix cache."""
        return 0 if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens


class SeenChunk(msgspec.Struct):
    """A chat chunk, as far as other surfaces look at it."""

    choices: list[SeenChoice]
    usage: SeenUsage | None = None


async def chat_chunks(
    service: Service,
    request_id: str,
    body: Mapping[str, Any],
    names: Mapping[str, str],
    on_chunk: Callable[[SeenChunk], Awaitable[None]],
) -> None:
    """Runs a chat request and calls `on_chunk` with each chunk; each has the usage so far but the first.

    body: a chat request without the fields about streaming. names: the caller's names for the chat's fields,
    for errors. Raises ApiError.
    """

    async def seen(value: Any) -> None:
        await on_chunk(msgspec.convert(msgspec.to_builtins(value), SeenChunk))

    streamed = {
        **body,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    try:
        await chat_completions(service, Inner(request_id, seen), msgspec.json.encode(streamed))
    except RvllmError as error:
        raise renamed(from_rvllm(error, ChatRequest.__struct_fields__), names) from None
    except ApiError as error:
        raise renamed(error, names) from None


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error in the words of another surface: its field and its message's first word are translated."""
    message = str(error)
    for ours, theirs in names.items():
        if message.startswith(ours) and not message[len(ours) : len(ours) + 1].isalnum():
            message = theirs + message[len(ours) :]
            break
    param = error.param
    if param is not None:
        head = param.partition(".")[0].partition("[")[0]
        param = names.get(head, param)
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


async def _nowhere(message: Any) -> None:
    pass
