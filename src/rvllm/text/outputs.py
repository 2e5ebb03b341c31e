"""What a finished or running request looks like to a Python caller, in vLLM's names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """A token's natural-log probability at one position, its rank (1 is most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""By token id: the token at the position and the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` outputs.

    finish_reason: "stop", "length" or "abort"; None while it runs.
    stop_reason: the stop string or stop token id that ended it; None for the model's own end token.
    logprobs: one entry a token, None when they were not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request: `time.time()` for instants, seconds for spans; None where nothing happened yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    time_in_queue: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """A request with all its outputs.

    prompt: the text, None when token ids were given.
    prompt_logprobs: one entry a prompt token, the first None since nothing precedes it.
    num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = field(default=None)
