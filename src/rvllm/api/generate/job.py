"""A request on its way through the engine: its choices, what they add, and how long that takes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from hashlib import blake2b

from rvllm.api.http.errors import invalid
from rvllm.api.http.keys import current_key
from rvllm.api.schemas.answers import PromptDetails, Usage
from rvllm.engine.ipc.messages import Generate, Output, PrefillChunk
from rvllm.engine.sampling_params import SamplingParams
from rvllm.telemetry.metrics import Metrics, RequestTimes
from rvllm.telemetry.timing import ChunkTiming, RequestTiming, current
from rvllm.text.processor import Choice, Delta

MERGED = 64  # pieces that wait between choices and their writer


@dataclass(slots=True)
class Piece:
    """What one engine step added to one choice of a request."""

    index: int
    delta: Delta


@dataclass
class Job:
    """A request on its way through the engine: its choices, in order of prompt, then of n.

    prompts: token ids of each prompt; params.n choices belong to each.
    """

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    generates: list[Generate]
    choices: list[Choice]
    arrival: float
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)  # by prompt

    def prompt_of(self, index: int) -> list[int]:
        """The prompt that a choice answers."""
        return self.prompts[index // self.params.n]

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once however many choices it has."""
        prompt = sum(len(tokens) for tokens in self.prompts)
        return Usage(
            prompt,
            self.completion_tokens,
            prompt + self.completion_tokens,
            PromptDetails(sum(self.cached_tokens.values())),
        )


BATCH_PRIORITY = 1 << 20  # behind all that people wait for


def checked_priority(priority: int | None, policy: str) -> int:
    """The engine's priority; 0 unless it was asked for. policy: the engine's --scheduling-policy.

    Raises a 400 for one beyond 32 bits, and for any but a batch's where the policy knows none.
    """
    if priority and priority < BATCH_PRIORITY and policy != "priority":
        raise invalid(f"priority: this server runs with --scheduling-policy {policy}", "priority")
    if priority is not None and not -(1 << 31) <= priority < 1 << 31:
        raise invalid("priority must fit in 32 bits", "priority")
    return priority or 0


class Retry:
    """When a client that is turned away should come back: by how fast requests ended lately."""

    MAX_SECONDS = 60

    def __init__(self) -> None:
        self._ended: deque[float] = deque(maxlen=64)

    def ended(self) -> None:
        self._ended.append(time.monotonic())

    def seconds(self, excess: int) -> int:
        """Whole seconds, 1 to 60, in which `excess` choices end at the pace of the last 64."""
        if len(self._ended) < 2:
            return 1
        pace = (time.monotonic() - self._ended[0]) / len(self._ended)
        return max(1, min(self.MAX_SECONDS, math.ceil(excess * pace)))


def client_of(fairness: str, user: str | None) -> str:
    """Whose request it is, where clients get fair shares by key or by the requests' user; else nobody's."""
    if fairness == "api-key":
        return current_key.get()
    return "" if fairness == "none" or user is None else blake2b(user.encode(), digest_size=8).hexdigest()


class Clock:
    """Times one choice for the histograms."""

    def __init__(self, metrics: Metrics, job: Job, request: Generate) -> None:
        self._metrics, self._arrival = metrics, job.arrival
        prompt, limit = len(request.prompt_token_ids), request.sampling.max_tokens
        self._times = RequestTimes(prompt, limit, job.params.n)
        timing = current.get() or RequestTiming(job.request_id, "")
        self.timing = timing.choice(request.request_id, prompt)

    def read(self, output: Output) -> None:
        """The engine has told where its time went and what the prefix cache held."""
        self.timing.cached_tokens = output.cached_tokens
        if output.prefill:
            self.timing.chunks = _chunks(output.prefill)

    def tokens(self, count: int, queue_seconds: float) -> None:
        """So many tokens have just come."""
        if not count:
            return
        now, times = time.perf_counter() - self._arrival, self._times
        if times.generation_tokens == 0:
            times.first, times.queue = now, queue_seconds
            self._metrics.observe(time_to_first_token_seconds=now)
            self.timing.first = self._since_request(now)
            self.timing.queued = max(0.0, self.timing.first - now) + queue_seconds
        else:
            self._metrics.observe(inter_token_latency_seconds=now - times.last)
        times.last = now
        times.generation_tokens += count
        self.timing.last = self._since_request(now)
        self.timing.output_tokens = times.generation_tokens

    def _since_request(self, seconds: float) -> float:
        """Seconds since the HTTP request came, of a moment given since the job was made."""
        request = current.get()
        return seconds if request is None else self._arrival + seconds - request.began

    def finished(self, reason: str) -> None:
        """The choice has ended; "abort" when its client left."""
        self.timing.finish_reason = self._times.finish_reason = reason
        self._times.cached_tokens = self.timing.cached_tokens
        self._metrics.finished(self._times)


def _chunks(prefill: Sequence[PrefillChunk]) -> list[ChunkTiming]:
    """Times of the engine's clock as seconds since the current request arrived."""
    request = current.get()
    arrived = prefill[0].began if request is None else request.arrived / 1e9
    return [ChunkTiming(c.step, c.tokens, c.began - arrived, c.ended - c.began) for c in prefill]


async def merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of several streams in the order they come; the first failure ends all of them."""
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(MERGED)

    async def pump(stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Piece):
                yield item
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
