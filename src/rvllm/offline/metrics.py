"""The engine's metrics as values, for scripts that have no server: `LLM.get_metrics`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rvllm.engine.core import EngineCore


@dataclass
class Metric:
    """A metric by the name that a server gives it."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Counter(Metric):
    """What only grows."""

    value: int = 0


@dataclass
class Gauge(Metric):
    """What goes up and down."""

    value: float = 0.0


@dataclass
class Vector(Metric):
    """Several counters under one name."""

    values: list[int] = field(default_factory=list)


@dataclass
class Histogram(Metric):
    """How often values were at most so large."""

    count: int = 0
    sum: float = 0.0
    buckets: dict[str, int] = field(default_factory=dict)


def metrics_of(core: EngineCore) -> list[Metric]:
    """What the engine counts, under the names of the server's `/metrics`."""
    stats = core.stats()
    found: list[Metric] = [
        Gauge("vllm:num_requests_running", value=stats.running),
        Gauge("vllm:num_requests_waiting", value=stats.waiting),
        Gauge("vllm:kv_cache_usage_perc", value=stats.blocks_used / max(stats.blocks_total, 1)),
        Counter("vllm:prefix_cache_queries", value=stats.prefix_queries),
        Counter("vllm:prefix_cache_hits", value=stats.cached_prompt_tokens),
        Counter("vllm:num_preemptions", value=stats.preemptions),
        Counter("vllm:prompt_tokens", value=stats.prompt_tokens),
        Counter("vllm:generation_tokens", value=stats.generation_tokens),
    ]
    for reason, count in sorted(stats.finished.items()):
        found.append(Counter("vllm:request_success", {"finished_reason": reason}, count))
    return found
