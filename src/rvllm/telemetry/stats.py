"""What an engine tells of itself: its counters, and the kernels of its last step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import msgspec

# Tokens of a step: at most so many; the bounds of vLLM's histogram of the same.
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LAYER = re.compile(r"layers\.\d+\.")


class StepKernel(msgspec.Struct, gc=False):
    """Launches of one kernel in a step, for ops alike but for their layer; why: how it was chosen."""

    op: str
    kernel: str
    count: int
    why: str = ""


def grouped(launches: Iterable[tuple[str, str, str]]) -> list[StepKernel]:
    """Launches (op, kernel, why) counted by what all layers have in common, in the order of first use."""
    counts = Counter((_LAYER.sub("", op), kernel, why) for op, kernel, why in launches)
    return [StepKernel(op, kernel, count, why) for (op, kernel, why), count in counts.items()]


class Stats(msgspec.Struct, tag="stats", kw_only=True, array_like=True):
    """A snapshot for metrics and the live page."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0  # free to take, but holding a reusable prefix
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_prompt_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    preemptions: int = 0
    finished: dict[str, int] = {}  # requests ended, by finish reason
    loop_seconds: float = 0.0  # since the engine became ready
    idle_seconds: float = 0.0  # of these, waiting for a request
    host_seconds: float = 0.0  # of these, scheduling and bookkeeping
    masks: int = 0  # token masks computed for grammars
    mask_seconds: float = 0.0  # in all
    mask_exposed_seconds: float = 0.0  # that the device waited for masks
    step_tokens: int = 0  # computed by all steps
    step_counts: list[int] = []  # steps by their number of tokens, see STEP_TOKENS
    kernels: list[StepKernel] = []  # of the last step, in the order of first use; only when asked for
    floor_ratio: float | None = None  # floor of the last decode steps over what they took; None: unknown
    mask_p50_seconds: float = 0.0  # how long a token waited for its mask, among the last few thousand
    mask_p99_seconds: float = 0.0
    backend: dict[str, float] = {}
    broken_logits: int = 0  # draws from logits that are infinite or no numbers; each ended its request
    cpu_blocks_total: int = 0  # KV blocks in host memory
    cpu_blocks_used: int = 0  # of these, holding a prefix
    host_hits: int = 0  # of cached_prompt_tokens, those whose blocks came from host memory
    sleep_level: int = 0  # 0: awake
    swaps: int = 0  # of preemptions, those whose blocks may move to host memory
    blocks_moved_out: int = 0
    blocks_moved_in: int = 0
