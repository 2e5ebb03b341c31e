"""What two servers did in the same time, read from their Prometheus metrics, as figures for a gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from rvllm.bench.gate import Figure

LATENCIES = {
    "time to first token, s": "vllm:time_to_first_token_seconds",
    "time between tokens, s": "vllm:inter_token_latency_seconds",
}
RESPONSES = "rvllm:http_responses_total"
SEND = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings")


@dataclass(frozen=True)
class Reading:
    """Counters of one server at one time: sums and counts of histograms by name, answers, failures."""

    sums: dict[str, float]
    counts: dict[str, float]
    answers: float
    failures: float


def reading(page: str) -> Reading:
    """Reads a page of /metrics. Raises ValueError when it is none."""
    sums = dict.fromkeys(LATENCIES.values(), 0.0)
    counts = dict.fromkeys(LATENCIES.values(), 0.0)
    answers = failures = 0.0
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            for name in LATENCIES.values():
                if sample.name == f"{name}_sum":
                    sums[name] += sample.value
                elif sample.name == f"{name}_count":
                    counts[name] += sample.value
            if sample.name == RESPONSES and sample.labels["path"] in SEND:
                answers += sample.value
                failures += sample.value * sample.labels["status"].startswith("5")
    return Reading(sums, counts, answers, failures)


def means(readings: Sequence[Reading], name: str) -> list[float]:
    """The mean latency of each stretch between two readings in which the server had any."""
    found = []
    for before, after in pairwise(readings):
        count = after.counts[name] - before.counts[name]
        if count > 0:
            found.append((after.sums[name] - before.sums[name]) / count)
    return found


def failure_share(readings: Sequence[Reading]) -> float:
    """Answers with a 5xx status between the first and the last reading, as a share; nan without answers."""
    answers = readings[-1].answers - readings[0].answers
    return (readings[-1].failures - readings[0].failures) / answers if answers > 0 else math.nan


def live_figures(old: Sequence[Reading], new: Sequence[Reading]) -> list[Figure]:
    """Latencies of both servers over the same stretches; those that either lacks are left out."""
    pairs = {title: (means(old, name), means(new, name)) for title, name in LATENCIES.items()}
    return [
        Figure(title, before, after, higher_is_better=False)
        for title, (before, after) in pairs.items()
        if min(len(before), len(after)) >= 3
    ]
