"""Where the time of a request went, for a response header, `rvllm trace` and OpenTelemetry spans."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field

_CHOICE = re.compile(r"-\d+-\d+$")  # what the engine's ids have behind the answer's
KEPT = 512  # finished requests whose times are kept


@dataclass(frozen=True, slots=True)
class ChunkTiming:
    """A part of a prompt that one step computed; began: seconds since the request arrived."""

    step: int
    tokens: int
    began: float
    seconds: float


@dataclass(slots=True)
class ChoiceTiming:
    """One choice of an answer. Times in seconds since the request arrived; 0 where it did not get so far.

    queued: when its first step began; first, last: when its first and last tokens came.
    chunks: how the prompt was computed, for the choice that the engine computed it for.
    detokenize, stream: seconds spent, in all, on turning tokens into text and on handing it to the client.
    """

    id: str
    prompt_tokens: int
    queued: float = 0.0
    first: float = 0.0
    last: float = 0.0
    detokenize: float = 0.0
    stream: float = 0.0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    chunks: list[ChunkTiming] = field(default_factory=list)

    def phases(self) -> dict[str, float]:
        """Seconds by phase; one that was not reached is left out."""
        found: dict[str, float] = {}
        if self.first:
            found = {"queue": self.queued, "prefill": max(0.0, self.first - self.queued)}
        if self.last > self.first:
            found["decode"] = self.last - self.first
        if self.output_tokens:
            found |= {"detokenize": self.detokenize, "stream": self.stream}
        return found


@dataclass(slots=True)
class RequestTiming:
    """One HTTP request; arrived: nanoseconds since the epoch. traceparent, tracestate: as W3C has them."""

    id: str
    path: str
    traceparent: str = ""
    tracestate: str = ""
    status: int = 0
    arrived: int = field(default_factory=time.time_ns)
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    choices: list[ChoiceTiming] = field(default_factory=list)

    def choice(self, id: str, prompt_tokens: int) -> ChoiceTiming:
        """The times of one more choice, to be filled in.

        Work that a request has left behind (a batch) is no part of it once it is answered.
        """
        choice = ChoiceTiming(id, prompt_tokens)
        if not self.seconds:
            self.choices.append(choice)
        return choice

    def since(self) -> float:
        return time.perf_counter() - self.began

    def line(self) -> str:
        """The times so far as in a Server-Timing header, in milliseconds; of several choices the longest."""
        phases: dict[str, float] = {}
        for choice in self.choices:
            for name, seconds in choice.phases().items():
                phases[name] = max(seconds, phases.get(name, 0.0))
        phases["total"] = self.seconds or self.since()
        return ", ".join(f"{name};dur={1e3 * seconds:.3f}" for name, seconds in phases.items())


current: ContextVar[RequestTiming | None] = ContextVar("rvllm_request_timing", default=None)


class RecentTimings:
    """The last finished requests that reached the engine, by their ids."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, RequestTiming] = OrderedDict()

    def add(self, timing: RequestTiming) -> None:
        """Keeps one; the oldest is forgotten."""
        self._kept[timing.id] = timing
        self._kept.move_to_end(timing.id)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def find(self, id: str) -> RequestTiming | None:
        """By the X-Request-Id, or by the id in the answer or in the engine (chatcmpl-…)."""
        if id in self._kept:
            return self._kept[id]
        for timing in reversed(self._kept.values()):
            if any(_CHOICE.sub("", choice.id) == id or choice.id == id for choice in timing.choices):
                return timing
        return None
