"""An answer as server-sent events, in whatever shape an endpoint gives them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from msgspec import UnsetType

from rvllm.api.http.exchange import Exchange
from rvllm.api.schemas.answers import Usage
from rvllm.api.schemas.requests import StreamOptions

T = TypeVar("T")


class Chunk(Protocol):
    """An event of a stream: a struct that can carry the usage so far."""

    usage: Usage | UnsetType | None


async def stream(
    exchange: Exchange,
    steps: AsyncGenerator[T, None],
    options: StreamOptions | None,
    events: Callable[[T], Sequence[Chunk]],
    last: Callable[[], Chunk],
    usage: Callable[[], Usage],
) -> None:
    """Sends the events of each step of an answer, then the usage if asked for.

    events: what a step adds, possibly nothing. last: an event without choices, to carry the usage.
    Nothing is sent before the first step, so that a refusal keeps its status.
    """
    with_usage = options is not None and options.include_usage
    running_usage = options is not None and options.continuous_usage_stats
    async with aclosing(steps):
        async for step in steps:
            if not exchange.streaming:
                await exchange.open_stream()
            for event in events(step):
                if with_usage:
                    event.usage = usage() if running_usage else None
                await exchange.event(event)
    if with_usage:
        end = last()
        end.usage = usage()
        await exchange.event(end)
    await exchange.close_stream()
