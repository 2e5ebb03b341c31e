"""What a run of requests against a server amounts to, in the fields and lines of vLLM's `bench serve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any

from rvllm.bench.load import Sent
from rvllm.bench.stats import percentile

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
    "client_queue_time": "Client-side Queueing",
    "e2el_including_client_queue": "Queue-inclusive End-to-end Latency",
}
_NAMES = {
    "client_queue_time": "Client Queue Time", "e2el_including_client_queue": "E2EL incl. Client Queue",
}  # fmt: skip
GOALS = ("ttft", "tpot", "e2el")  # what --goodput can bound
_WIDTH = 50


def summary(
    sent: Sequence[Sent],
    seconds: float,
    metrics: Sequence[str],
    ranks: Sequence[float],
    goals: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Totals, rates and latencies in ms. metrics: of TITLES; ranks: percentiles in 0 to 100.

    goals: of the requests that count for the goodput (Zhong et al. 2024), see `good`.
    """
    done = [one for one in sent if not one.error]
    inputs, outputs = sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(sent) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "request_goodput": sum(good(one, goals) for one in done) / seconds if goals else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": _busiest(done),
        "max_concurrent_requests": _together(done),
    }
    values = {
        "ttft": [one.first - one.start for one in done],
        "tpot": [(one.last - one.first) / (one.output_tokens - 1) for one in done if one.output_tokens > 1],
        "itl": [gap for one in done for gap in one.gaps],
        "e2el": [one.last - one.start for one in done],
        "client_queue_time": [one.queued for one in done],
        "e2el_including_client_queue": [one.last - one.start + one.queued for one in done],
    }
    for name in metrics:
        times = [value * 1000 for value in values[name]] or [0.0]
        found[f"mean_{name}_ms"] = fmean(times)
        found[f"median_{name}_ms"] = percentile(times, 50)
        found[f"std_{name}_ms"] = pstdev(times)
        for rank in ranks:
            found[f"p{rank:g}_{name}_ms"] = percentile(times, rank)
    return found


def details(sent: Sequence[Sent]) -> dict[str, Any]:
    """Each request's lengths in tokens, times in seconds and error, in the order they were sent."""
    return {
        "input_lens": [one.prompt_tokens for one in sent],
        "output_lens": [one.output_tokens for one in sent],
        "ttfts": [max(0.0, one.first - one.start) for one in sent],
        "itls": [one.gaps for one in sent],
        "latencies": [max(0.0, one.last - one.start) for one in sent],
        "start_times": [one.start for one in sent],
        "queue_times": [one.queued for one in sent],
        "generated_texts": [one.text for one in sent],
        "errors": [one.error for one in sent],
    }


def good(one: Sent, goals: Mapping[str, float]) -> bool:
    """Whether a request came back whole and kept all goals: by name of GOALS, the most ms.

    tpot is the mean of a request. An answer of one token has no time between tokens.
    """
    spent = {
        "ttft": one.first - one.start,
        "tpot": (one.last - one.first) / (one.output_tokens - 1) if one.output_tokens > 1 else 0.0,
        "e2el": one.last - one.start,
    }
    return not one.error and all(spent[name] * 1000 <= most for name, most in goals.items())


def _busiest(sent: Sequence[Sent]) -> float:
    """The most pieces of text that came in one second, counted from the first request on."""
    began = min((one.start for one in sent), default=0.0)
    times = [time - began for one in sent for time in accumulate(one.gaps, initial=one.first)]
    return float(max(Counter(map(int, times)).values(), default=0))


def _together(sent: Sequence[Sent]) -> int:
    """The most requests that were under way at one time."""
    events = sorted([(one.start, 1) for one in sent] + [(one.last, -1) for one in sent])
    most = running = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def page(
    found: dict[str, Any],
    metrics: Sequence[str],
    ranks: Sequence[float],
    asked: Sequence[tuple[str, float]] = (),
) -> str:
    """The result as lines of about 50 columns. asked: lines of what was asked for."""
    lines, values = [_title("Serving Benchmark Result", "=")], {**found, **dict(asked)}
    for text, name in (
        ("Successful requests:", "completed"), ("Failed requests:", "failed"),
        *((text, text) for text, _ in asked), ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Request goodput (req/s):", "request_goodput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
    ):  # fmt: skip
        if values[name] is not None:
            lines.append(_line(text, values[name]))
    for name in metrics:
        lines.append(_title(TITLES[name], "-"))
        upper = _NAMES.get(name, name.upper())
        lines.append(_line(f"Mean {upper} (ms):", found[f"mean_{name}_ms"]))
        lines.append(_line(f"Median {upper} (ms):", found[f"median_{name}_ms"]))
        lines += [_line(f"P{rank:g} {upper} (ms):", found[f"p{rank:g}_{name}_ms"]) for rank in ranks]
    return "\n".join([*lines, "=" * _WIDTH])


def _title(text: str, mark: str) -> str:
    return f" {text} ".center(_WIDTH, mark) if mark == "=" else text.center(_WIDTH, mark)


def _line(text: str, value: float) -> str:
    return f"{text:<40} {value:<9.2f}".rstrip() if isinstance(value, float) else f"{text:<40} {value}"
