"""A job's answer as server-sent events, in whatever shape an endpoint gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from msgspec import UnsetType

from rvllm.api.generate.generation import Service
from rvllm.api.generate.job import Job, Piece
from rvllm.api.http.exchange import Exchange
from rvllm.api.schemas.answers import Usage
from rvllm.api.schemas.requests import StreamOptions


class Chunk(Protocol):
    """An event of a stream: a struct that can carry the usage so far."""

    usage: Usage | UnsetType | None


async def stream(
    service: Service,
    exchange: Exchange,
    job: Job,
    options: StreamOptions | None,
    events: Callable[[Piece], Sequence[Chunk]],
    last: Callable[[], Chunk],
) -> None:
    """Runs a job and sends the events of each piece, then the usage if asked for.

    events: what a piece adds, possibly nothing. last: an event without choices, to carry the usage.
    Nothing is sent before the first piece, so that a refusal keeps its status.
    """
    with_usage = options is not None and options.include_usage
    running_usage = options is not None and options.continuous_usage_stats
    async with aclosing(service.run(job)) as pieces:
        async for piece in pieces:
            if not exchange.streaming:
                await exchange.open_stream()
            for event in events(piece):
                if with_usage:
                    event.usage = job.usage() if running_usage else None
                await exchange.event(event)
    if with_usage:
        end = last()
        end.usage = job.usage()
        await exchange.event(end)
    await exchange.close_stream()
