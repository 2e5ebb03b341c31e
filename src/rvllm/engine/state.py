"""What the engine is doing at a moment, for people who watch: who runs, who holds which blocks."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

from rvllm.engine.ipc.messages import GetState, SequenceState, State
from rvllm.telemetry.stats import Stats

if TYPE_CHECKING:
    from rvllm.engine.core import EngineCore
    from rvllm.engine.sequence import Sequence


def complete(core: EngineCore, stats: Stats) -> Stats:
    """Adds what is only worked out for those who ask: the last step's kernels, the floor of decode steps."""
    stats.kernels = core.backend.last_kernels()
    stats.floor_ratio = core.counters.floor_ratio(core.generator)
    return stats


def snapshot(core: EngineCore, stats: Stats, asked: GetState) -> State:
    """The state between two steps; its cost is bounded by what was asked for, not by the cache's size."""
    scheduler = core.scheduler
    described: list[SequenceState] = []
    budget, now = asked.blocks, time.time()
    for seq in islice((*scheduler.running, *scheduler.waiting), asked.sequences):
        described.append(_describe(seq, now, budget))
        budget -= len(described[-1].blocks)
    held = sum(len(seq.blocks) for seq in scheduler.running)
    cached = scheduler.blocks.oldest_cached(budget)
    alive = len(scheduler.running) + len(scheduler.waiting)
    stats.floor_ratio = core.counters.floor_ratio(core.generator)
    return State(
        stats=stats,
        sequences=described,
        cached_blocks=cached,
        cut=alive > asked.sequences or held + scheduler.blocks.cached > asked.blocks,
        kernels=core.backend.last_kernels(),
        floor_seconds=_floor(core),
    )


def _describe(seq: Sequence, now: float, blocks: int) -> SequenceState:
    return SequenceState(
        seq.request_id,
        seq.slot >= 0,
        seq.prompt_len,
        len(seq.tokens) - seq.prompt_len,
        seq.computed,
        seq.max_length - seq.prompt_len,
        seq.cached_tokens,
        max(0.0, now - seq.arrival) if seq.arrival else 0.0,
        max(0.0, (seq.first_scheduled or now) - seq.arrival) if seq.arrival else 0.0,
        seq.blocks[:blocks],
    )


def _floor(core: EngineCore) -> float | None:
    """The floor of a decode step of what runs now, each as long as they are on average."""
    running = core.scheduler.running
    if not running or core.generator is None:
        return None
    return core.generator.decode_floor(len(running), sum(len(seq.tokens) for seq in running) // len(running))
