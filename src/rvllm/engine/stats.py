"""What the engine counts, for metrics and the live page."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from rvllm.telemetry.stats import STEP_TOKENS, Stats

if TYPE_CHECKING:
    from rvllm.backends.base import Generator
    from rvllm.engine.core import EngineCore
    from rvllm.engine.step import Step

RECENT_STEPS = 256  # decode steps that the floor is compared with


class EngineStats:
    """Counters since the start; belongs to the engine's thread. counted: what all its parts add to."""

    def __init__(self) -> None:
        self.counted = Stats(step_counts=[0] * (len(STEP_TOKENS) + 1))
        self._started = time.perf_counter()
        self._collected = 0.0  # when a step was collected last
        self._decodes: deque[tuple[int, int, float]] = deque(maxlen=RECENT_STEPS)

    def launched(self, step: Step) -> None:
        step.launched, step.launched_at = time.perf_counter(), time.time()
        tokens = step.batch.num_tokens
        self.counted.step_tokens += tokens
        self.counted.step_counts[bisect_left(STEP_TOKENS, tokens)] += 1

    def ended(self, reason: str, requests: int = 1) -> None:
        """Requests end, for a finish reason."""
        self.counted.finished[reason] = self.counted.finished.get(reason, 0) + requests

    def collected(self, step: Step) -> None:
        """A step's tokens are there. It took the time since its launch or, when that was still under way
        then, since the end of the step before it."""
        now = time.perf_counter()
        if step.decodes_only:
            took = now - max(step.launched, self._collected)
            self._decodes.append((len(step.sequences), int(step.batch.starts.sum()), took))
        self._collected = now

    def floor_ratio(self, generator: Generator | None) -> float | None:
        """The least time of the last decode steps over the time they took; None before any, or unknown.

        Their floor is that of a step with the mean number of sequences of their mean length.
        """
        seconds = sum(took for _, _, took in self._decodes)
        seqs = sum(count for count, _, _ in self._decodes)
        if generator is None or not seconds or not seqs:
            return None
        steps = len(self._decodes)
        context = sum(tokens for _, tokens, _ in self._decodes) // seqs
        floor = generator.decode_floor(max(1, round(seqs / steps)), max(1, context))
        return None if floor is None else floor * steps / seconds

    def stats(self, core: EngineCore) -> Stats:
        """Counters since the start and the state of this moment."""
        scheduler, grammars, texts = core.scheduler, core.grammars, core.texts
        return msgspec.structs.replace(
            self.counted,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(texts) + len(grammars),
            blocks_total=scheduler.blocks.num_blocks,
            blocks_used=scheduler.blocks.used,
            blocks_cached=scheduler.blocks.cached,
            steps=scheduler.steps + texts.steps,
            prompt_tokens=self.counted.prompt_tokens + texts.tokens,
            finished=self.counted.finished.copy(),
            loop_seconds=time.perf_counter() - self._started,
            mask_p50_seconds=grammars.percentile(0.50),
            mask_p99_seconds=grammars.percentile(0.99),
            step_counts=self.counted.step_counts.copy(),
            backend=core.backend.stats(),
            cpu_blocks_total=scheduler.blocks.host.count if scheduler.blocks.host else 0,
            cpu_blocks_used=scheduler.blocks.host.used if scheduler.blocks.host else 0,
            sleep_level=core.sleep_level,
            blocks_moved_out=scheduler.blocks.moved_out,
            blocks_moved_in=scheduler.blocks.moved_in,
        )
