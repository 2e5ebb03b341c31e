"""Requests with the answers that the double must give, and books that must balance after every step."""

from __future__ import annotations

from dataclasses import dataclass, field

from rvllm.engine.core import EngineCore
from rvllm.engine.ipc.messages import Output
from support.doubles.engine import EOS, next_token

MAX_LEN = 100


@dataclass(frozen=True)
class Plan:
    """One request of a scenario: when it comes, what it asks, when it is cancelled (None: never)."""

    at: int
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    stops: tuple[int, ...]
    min_tokens: int
    priority: int
    prompt_logprobs: int | None
    logprobs: int | None
    cancel_at: int | None


@dataclass
class Received:
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list | None = None
    finish: list[tuple[str, int | None]] = field(default_factory=list)
    step: int = -1


def alone(plan: Plan, max_model_len: int) -> tuple[list[int], str, int | None]:
    """What a request must give, from the definition of the double's tokens."""
    history = list(plan.prompt)
    while True:
        token = next_token(history, len(plan.prompt), plan.seed, plan.min_tokens, plan.stops)
        history.append(token)
        drawn = len(history) - len(plan.prompt)
        if token in plan.stops and drawn >= plan.min_tokens:
            return history[len(plan.prompt) :], "stop", None if token == EOS else token
        if drawn == plan.max_tokens or len(history) == max_model_len:
            return history[len(plan.prompt) :], "length", None


def take(outputs: list[Output], received: dict[int, Received], step: int) -> None:
    for output in outputs:
        into = received[int(output.request_id[1:])]
        assert not into.finish, "an output after the end"
        assert output.token_ids or output.finish_reason
        into.tokens += output.token_ids
        into.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert into.prompt_logprobs is None
            into.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason:
            into.finish.append((output.finish_reason, output.stop_reason))
            into.step = step


def check_books(core: EngineCore) -> None:
    scheduler = core.scheduler
    held: set[int] = set()
    slots: set[int] = set()
    for seq in scheduler.running:
        assert 0 <= seq.slot < scheduler.limits.max_num_seqs and seq.slot not in slots
        assert seq.computed <= seq.launched <= seq.length <= seq.max_length
        assert seq.launched <= seq.capacity
        slots.add(seq.slot)
        held.update(seq.blocks)
    for seq in scheduler.waiting:
        assert seq.slot == -1 and not seq.blocks
    assert len(held) == scheduler.blocks.used
