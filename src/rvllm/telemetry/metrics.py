"""Prometheus metrics: vLLM's names where the meaning is the same, `rvllm:` ones for what only we have.

Counters and histograms of requests are fed by the HTTP layer; what the engine knows (queues, blocks, tokens)
comes as a snapshot when the page is read.
"""

from __future__ import annotations

import re
from collections import Counter as Counts
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rvllm.telemetry.stats import STEP_TOKENS, Stats, StepKernel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of vLLM's histograms, in seconds and in tokens, so that its dashboards show ours.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
                80, 160, 640, 2560)  # fmt: skip
_BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
                   80)  # fmt: skip
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
            7680)  # fmt: skip
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_ODD = re.compile(r"\W", re.ASCII)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
# vLLM's histograms of requests by name: what they are of, and their bounds.
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Time to first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Time between tokens.", _BETWEEN_TOKENS),
    "request_time_per_output_token_seconds": ("A request's mean time per output token after the first.",
                                              _BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("Time from arrival to last token.", _REQUEST),
    "request_queue_time_seconds": ("Time from arrival to first step.", _REQUEST),
    "request_prefill_time_seconds": ("Time from first step to first token.", _REQUEST),
    "request_decode_time_seconds": ("Time from first to last token.", _REQUEST),
    "request_inference_time_seconds": ("Time from first step to last token.", _REQUEST),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens of a request not found cached.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest choice.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of requests.", _TOKENS),
    "request_params_n": ("n of requests.", (1, 2, 5, 10, 20)),
}  # fmt: skip


@dataclass(slots=True)
class RequestTimes:
    """One choice, for the histograms; times in seconds since the request arrived.

    first, last: when its first and last token came (0: none came); queue: how long it waited for its first
    step.
    """

    prompt_tokens: int
    max_tokens: int
    n: int
    finish_reason: str = ""
    generation_tokens: int = 0
    queue: float = 0.0
    first: float = 0.0
    last: float = 0.0
    cached_tokens: int = 0  # of the prompt


class Metrics:
    """All metrics of a server, in a registry of its own."""

    def __init__(
        self,
        model_name: str,
        cache_config: Mapping[str, str],
        engine_info: Mapping[str, str] | None = None,
        engine: int = 0,
    ) -> None:
        """engine_info: the settings that decide what computes a step, by label; engine: its number."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._infos = {
            "vllm:cache_config_info": ("KV cache settings.", {**cache_config, "engine": str(engine)}),
            "rvllm:engine_info": ("What computes a step.", {**self._labels, **(engine_info or {})}),
        }
        names = tuple(self._labels)

        self._histograms = {
            name: Histogram(f"vllm:{name}", help, names, buckets=bounds, registry=self.registry).labels(
                **self._labels
            )
            for name, (help, bounds) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            "vllm:request_success",
            "Choices that ended, by finish reason.",
            (*names, "finished_reason"),
            registry=self.registry,
        )
        self._responses = Counter(
            "rvllm:http_responses",
            "HTTP answers by path and status.",
            ("path", "status"),
            registry=self.registry,
        )

    def observe(self, **values: float) -> None:
        """Takes values of histograms, by their names without the prefix; seconds or tokens."""
        for name, value in values.items():
            self._histograms[name].observe(value)

    def response(self, path: str, status: int) -> None:
        """A request was answered; `path` is a route of ours, never the client's text."""
        self._responses.labels(path, str(status)).inc()

    def finished(self, done: RequestTimes) -> None:
        self._success.labels(**self._labels, finished_reason=done.finish_reason).inc()
        self.observe(
            request_prompt_tokens=done.prompt_tokens,
            request_generation_tokens=done.generation_tokens,
            request_params_max_tokens=done.max_tokens,
            request_params_n=done.n,
            request_prefill_kv_computed_tokens=max(0, done.prompt_tokens - done.cached_tokens),
        )
        if not done.first:
            return
        self.observe(
            e2e_request_latency_seconds=done.last,
            request_queue_time_seconds=done.queue,
            request_prefill_time_seconds=max(0.0, done.first - done.queue),
            request_decode_time_seconds=done.last - done.first,
            request_inference_time_seconds=max(0.0, done.last - done.queue),
        )
        if done.generation_tokens > 1:
            mean = (done.last - done.first) / (done.generation_tokens - 1)
            self.observe(request_time_per_output_token_seconds=mean)

    def families(self, engine: Stats | None) -> Iterator[Metric]:
        """All metrics with the engine's at this moment; None when the engine process is gone."""
        yield from self.registry.collect()
        if engine is not None:
            yield from _Snapshot(engine, self._labels, self._infos).collect()


def metrics_page(models: Sequence[tuple[Metrics, Stats | None]]) -> bytes:
    """The exposition text of several models: one family a name, whose samples their labels tell apart."""
    joined: dict[str, Metric] = {}
    for metrics, engine in models:
        for family in metrics.families(engine):
            known = joined.setdefault(family.name, family)
            if known is not family:
                known.samples += family.samples
    page = CollectorRegistry()
    page.register(_Collected(list(joined.values())))
    return generate_latest(page)


class _Collected(Collector):
    """Families that have been collected."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


@dataclass
class _Snapshot:
    """The engine's figures as metric families."""

    _engine: Stats
    _labels: Mapping[str, str]
    _infos: Mapping[str, tuple[str, Mapping[str, str]]]

    def collect(self) -> Iterator[Metric]:
        yield from self._requests_and_tokens()
        yield from self._as_vllm_has_them()
        yield self._step_histogram()
        for name, (help, values) in self._infos.items():
            info = GaugeMetricFamily(name, help, labels=list(values))
            info.add_metric(list(values.values()), 1)
            yield info
        yield from self._kv_blocks()
        if (ratio := self._engine.floor_ratio) is not None:
            yield self._gauge(
                "rvllm:decode_floor_ratio",
                "Share of the limit: the least time of the last decode steps over the time they took.",
                ratio,
            )
        yield self._kernels()
        yield from self._engine_seconds()
        yield from self._of_backend()

    def _requests_and_tokens(self) -> Iterator[Metric]:
        engine = self._engine
        total = max(1, engine.blocks_total)
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", engine.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting to run.", engine.waiting)
        share = engine.blocks_used / total
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 1 is all.", share)
        yield self._counter("vllm:num_preemptions", "Preemptions.", engine.preemptions)
        yield self._counter(
            "rvllm:broken_logits",
            "Draws from logits that are infinite or no numbers; each ended its request.",
            engine.broken_logits,
        )
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed.", engine.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", engine.generation_tokens)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", engine.prefix_queries)
        yield self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens found cached.", engine.cached_prompt_tokens
        )

    def _kv_blocks(self) -> Iterator[Metric]:
        engine = self._engine
        yield self._gauge("rvllm:kv_blocks_total", "KV blocks there are.", engine.blocks_total)
        yield self._gauge("rvllm:kv_blocks_used", "KV blocks held by sequences.", engine.blocks_used)
        yield self._gauge(
            "rvllm:kv_blocks_cached", "Free KV blocks with a reusable prefix.", engine.blocks_cached
        )
        tiers = {"in use": engine.blocks_used, "cached": engine.blocks_cached}
        tiers["empty"] = engine.blocks_total - sum(tiers.values())
        tiers["host memory, with a prefix"] = engine.cpu_blocks_used
        tiers["host memory, empty"] = engine.cpu_blocks_total - engine.cpu_blocks_used
        yield self._by_label("rvllm:kv_blocks", "KV blocks by tier.", "tier", tiers)
        hits = {"device": engine.cached_prompt_tokens - engine.host_hits, "host": engine.host_hits}
        yield self._by_label(
            "rvllm:prefix_cache_hits_by_tier", "Prompt tokens found cached, by tier.", "tier", hits, True
        )
        moved = {"to host memory": engine.blocks_moved_out, "to the device": engine.blocks_moved_in}
        yield self._by_label("rvllm:kv_blocks_moved", "KV blocks copied.", "direction", moved, True)
        how = {"swap": engine.swaps, "recompute": engine.preemptions - engine.swaps}
        yield self._by_label("rvllm:preemptions_by_mode", "Preemptions by what becomes of the blocks.",
                             "mode", how, True)  # fmt: skip

    def _engine_seconds(self) -> Iterator[Metric]:
        engine = self._engine
        yield self._counter("rvllm:engine_steps", "Steps computed.", engine.steps)
        yield self._counter("rvllm:engine_loop_seconds", "Seconds since ready.", engine.loop_seconds)
        yield self._counter("rvllm:engine_idle_seconds", "Seconds without work.", engine.idle_seconds)
        yield self._counter(
            "rvllm:engine_host_seconds", "Seconds scheduling and booking.", engine.host_seconds
        )
        yield self._counter("rvllm:grammar_masks", "Token masks computed for grammars.", engine.masks)
        yield self._counter("rvllm:grammar_mask_seconds", "Seconds computing them.", engine.mask_seconds)
        waited = "How long a token waited for its mask, of the last few thousand: "
        yield self._counter(
            "rvllm:grammar_mask_exposed_seconds",
            "Seconds of these with no step on the device.",
            engine.mask_exposed_seconds,
        )
        yield self._gauge("rvllm:grammar_mask_p50_seconds", waited + "median.", engine.mask_p50_seconds)
        yield self._gauge("rvllm:grammar_mask_p99_seconds", waited + "p99.", engine.mask_p99_seconds)

    def _as_vllm_has_them(self) -> Iterator[Metric]:
        """What dashboards made for vLLM ask for besides; what we have none of is 0."""
        engine = self._engine
        cached = engine.cached_prompt_tokens
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens found cached.", cached)
        sources = {
            "local_compute": max(0, engine.prompt_tokens - cached),
            "local_cache_hit": cached,
            "external_kv_transfer": 0,
        }
        yield self._by_label(
            "vllm:prompt_tokens_by_source", "Prompt tokens by source.", "source", sources, True
        )
        names = ("awake", "weights_offloaded", "discard_all")
        states = {name: int(engine.sleep_level == level) for level, name in enumerate(names)}
        yield self._by_label("vllm:engine_sleep_state", "1 for the state it is in.", "sleep_state", states)
        yield self._counter("vllm:corrupted_requests", "Requests with broken logits.", engine.broken_logits)
        share = engine.blocks_used / max(1, engine.blocks_total)
        host = engine.cpu_blocks_used / max(1, engine.cpu_blocks_total)
        yield self._gauge("vllm:cpu_cache_usage_perc", "KV blocks of host memory in use, 1 is all.", host)
        yield self._gauge("vllm:gpu_cache_usage_perc", "kv_cache_usage_perc under its older name.", share)
        older = "Of the prefix cache, under an older name."
        yield self._counter("vllm:gpu_prefix_cache_queries", older, engine.prefix_queries)
        yield self._counter("vllm:gpu_prefix_cache_hits", older, cached)
        for name in ("external_prefix_cache_queries", "external_prefix_cache_hits", "mm_cache_queries",
                     "mm_cache_hits", "spec_decode_num_drafts", "spec_decode_num_draft_tokens",
                     "spec_decode_num_accepted_tokens"):  # fmt: skip
            yield self._counter(f"vllm:{name}", "There are none here.", 0)
        yield self._gauge("vllm:num_requests_swapped", "There are none here.", 0)

    def _of_backend(self) -> Iterator[Metric]:
        """A backend's own figures: counters where their names say so; labels may follow in braces."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for key, value in sorted(self._engine.backend.items()):
            name, _, rest = key.partition("{")
            name = _ODD.sub("_", name.removeprefix("rvllm:").removeprefix("backend_"))
            labels = {**self._labels, **dict(_LABEL.findall(rest))}
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = families.setdefault(
                name,
                kind(f"rvllm:backend_{name.removesuffix('_total')}", "Of the backend.", labels=list(labels)),
            )
            family.add_metric(list(labels.values()), value)
        yield from families.values()

    def _step_histogram(self) -> Metric:
        """vLLM's histogram of tokens per step, out of what the engine has counted."""
        engine = self._engine
        bounds = [*(str(float(bound)) for bound in STEP_TOKENS), "+Inf"]
        counts = engine.step_counts or [0] * len(bounds)
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed by a step.", labels=list(self._labels)
        )
        buckets = list(zip(bounds, accumulate(counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, engine.step_tokens)
        return family

    def _kernels(self) -> Metric:
        family = GaugeMetricFamily(
            "rvllm:step_kernel_launches",
            "Launches of the last step by op and kernel.",
            labels=[*self._labels, "op", "kernel"],
        )
        for (op, kernel), count in _summed(self._engine.kernels).items():
            family.add_metric([*self._labels.values(), op, kernel], count)
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        return self._by_label(name, help, "", {"": value})

    def _counter(self, name: str, help: str, value: float) -> Metric:
        return self._by_label(name, help, "", {"": value}, True)

    def _by_label(
        self, name: str, help: str, label: str, values: Mapping[str, float], counts: bool = False
    ) -> Metric:
        """A family with a sample for each value of a label; label "": there is none."""
        kind = CounterMetricFamily if counts else GaugeMetricFamily
        family = kind(name, help, labels=[*self._labels, *([label] if label else ())])
        for value, amount in values.items():
            family.add_metric([*self._labels.values(), *([value] if label else ())], amount)
        return family


def _summed(kernels: Sequence[StepKernel]) -> dict[tuple[str, str], int]:
    counts: Counts[tuple[str, str]] = Counts()
    for kernel in kernels:
        counts[kernel.op, kernel.kernel] += kernel.count
    return counts
