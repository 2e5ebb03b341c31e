"""What a run of requests against a server amounts to, in the fields and lines of vLLM's `bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

from rvllm.bench.load import Sent
from rvllm.bench.stats import percentile

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_WIDTH = 50


def summary(
    sent: Sequence[Sent], seconds: float, metrics: Sequence[str], ranks: Sequence[float]
) -> dict[str, Any]:
    """Totals, rates and latencies in ms. metrics: of TITLES; ranks: percentiles in 0 to 100."""
    done = [one for one in sent if not one.error]
    inputs, outputs = sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(sent) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_concurrent_requests": _together(done),
    }
    values = {
        "ttft": [one.first - one.start for one in done],
        "tpot": [(one.last - one.first) / (one.output_tokens - 1) for one in done if one.output_tokens > 1],
        "itl": [gap for one in done for gap in one.gaps],
        "e2el": [one.last - one.start for one in done],
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
        "start_times": [one.start for one in sent],
        "errors": [one.error for one in sent],
    }


def _together(sent: Sequence[Sent]) -> int:
    """The most requests that were under way at one time."""
    events = sorted([(one.start, 1) for one in sent] + [(one.last, -1) for one in sent])
    most = running = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def page(found: dict[str, Any], metrics: Sequence[str], ranks: Sequence[float]) -> str:
    """The result as lines of at most 50 columns."""
    lines = [_title("Serving Benchmark Result", "=")]
    for text, name in (
        ("Successful requests:", "completed"), ("Failed requests:", "failed"),
        ("Benchmark duration (s):", "duration"), ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
    ):  # fmt: skip
        lines.append(_line(text, found[name]))
    for name in metrics:
        lines.append(_title(TITLES[name], "-"))
        upper = name.upper()
        lines.append(_line(f"Mean {upper} (ms):", found[f"mean_{name}_ms"]))
        lines.append(_line(f"Median {upper} (ms):", found[f"median_{name}_ms"]))
        lines += [_line(f"P{rank:g} {upper} (ms):", found[f"p{rank:g}_{name}_ms"]) for rank in ranks]
    return "\n".join([*lines, "=" * _WIDTH])


def _title(text: str, mark: str) -> str:
    return f" {text} ".center(_WIDTH, mark) if mark == "=" else text.center(_WIDTH, mark)


def _line(text: str, value: float) -> str:
    return f"{text:<40} {value:<9.2f}".rstrip() if isinstance(value, float) else f"{text:<40} {value}"
