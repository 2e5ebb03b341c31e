"""Results of measurements: medians of runs, as a table, as JSON, and beside an earlier run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from rvllm.bench.files import json_text, write_whole
from rvllm.bench.gate import Figure
from rvllm.bench.stats import median, percentile, rate
from rvllm.errors import UsageError
from rvllm.settings import flag_of


@dataclass
class Run:
    """What was seen in one run of `n` simultaneous requests. Times in seconds since all were submitted.

    firsts: when each request got its first token; gaps: times between consecutive tokens of a request.
    """

    prompt_tokens: int
    output_tokens: int
    seconds: float
    firsts: list[float]
    gaps: list[float]


@dataclass(frozen=True)
class Result:
    """Medians over the runs of one batch size.

    tokens_per_s: output tokens over the whole time. prefill_tokens_per_s: prompt tokens until every request
    had its first token. decode_tokens_per_s: output tokens after that, over the rest of the time.
    """

    n: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_ms: float
    ttft_p99_ms: float
    itl_ms: float
    itl_p99_ms: float


def figures_of(n: int, run: Run) -> dict[str, float]:
    """What one run of `n` requests amounts to, by the names of `Result`."""
    prefill = max(run.firsts)
    return {
        "seconds": run.seconds,
        "tokens_per_s": rate(run.output_tokens, run.seconds),
        "prefill_tokens_per_s": rate(run.prompt_tokens, prefill),
        "decode_tokens_per_s": rate(run.output_tokens - n, run.seconds - prefill),
        "ttft_ms": 1e3 * median(run.firsts),
        "ttft_p99_ms": 1e3 * percentile(run.firsts, 99),
        "itl_ms": 1e3 * median(run.gaps),
        "itl_p99_ms": 1e3 * percentile(run.gaps, 99),
    }


def samples_of(n: int, runs: Sequence[Run]) -> dict[str, list[float]]:
    """Each figure of `figures_of` over the runs."""
    each = [figures_of(n, run) for run in runs]
    return {name: [figures[name] for figures in each] for name in each[0]}


def summarise(n: int, runs: Sequence[Run]) -> Result:
    """The medians of several runs of `n` requests each."""
    medians = {name: median(values) for name, values in samples_of(n, runs).items()}
    return Result(n=n, prompt_tokens=runs[0].prompt_tokens, output_tokens=runs[0].output_tokens, **medians)


_COLUMNS = {
    "n": "N",
    "prompt_tokens": "prompt",
    "output_tokens": "output",
    "seconds": "s",
    "tokens_per_s": "tok/s",
    "prefill_tokens_per_s": "prefill tok/s",
    "decode_tokens_per_s": "decode tok/s",
    "ttft_ms": "TTFT ms",
    "ttft_p99_ms": "p99",
    "itl_ms": "ITL ms",
    "itl_p99_ms": "p99",
}


def table(results: Sequence[Result], before: Sequence[Result] = ()) -> str:
    """An aligned table; with results of an earlier run, how many times faster or slower the new ones are."""
    head = [*_COLUMNS.values()]
    if before:
        head += ["tok/s before", "ratio"]
    rows = [head]
    for result in results:
        row = [_shown(getattr(result, name)) for name in _COLUMNS]
        if before:
            row += _beside(result, before)
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _beside(result: Result, before: Sequence[Result]) -> list[str]:
    same = (result.n, result.prompt_tokens, result.output_tokens)
    for old in before:
        if (old.n, old.prompt_tokens, old.output_tokens) == same:
            ratio = rate(result.tokens_per_s, old.tokens_per_s)
            return [_shown(old.tokens_per_s), f"{ratio:.2f}x"]
    return ["-", "-"]


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):  # a single token has no gaps
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def write_json(
    path: Path,
    about: dict[str, Any],
    results: Sequence[Result],
    samples: Sequence[dict[str, list[float]]] = (),
) -> None:
    """Writes results with what was measured, and each run's figures where given.

    Raises UsageError when the file cannot be written.
    """
    rows: list[dict[str, Any]] = [asdict(result) for result in results]
    for row, each in zip(rows, samples, strict=False):
        row["samples"] = each
    write_whole(path, json_text({**about, "results": rows}), "--json")


def read_json(path: Path, flag: str = "--compare") -> list[Result]:
    """The results of a file that `write_json` wrote. Raises UsageError naming the flag when it is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        known = {field.name for field in fields(Result)}
        return [msgspec.convert({name: _number(row[name]) for name in known}, Result) for row in rows]
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError):
        raise UsageError(f"{flag}: {path} holds no results of rvllm benchmark --json") from None


GATED = {"tokens_per_s": True, "ttft_ms": False, "itl_ms": False}  # whether more is better


def gated(path: Path, results: Sequence[Result], samples: Sequence[dict[str, list[float]]]) -> list[Figure]:
    """The figures of an earlier file beside those of now, run by run.

    Raises UsageError when the file was written without its runs or has a batch size or length less.
    """
    before = {
        (old.n, old.prompt_tokens, old.output_tokens): i for i, old in enumerate(read_json(path, "--gate"))
    }
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    found = []
    for result, now in zip(results, samples, strict=True):
        size = (result.n, result.prompt_tokens, result.output_tokens)
        if size not in before:
            raise UsageError(f"--gate: {path} has no run of N={size[0]}, {size[1]} tokens in, {size[2]} out")
        try:
            then = msgspec.convert(rows[before[size]]["samples"], dict[str, list[float | None]])
        except (KeyError, msgspec.ValidationError):
            raise UsageError(f"--gate: {path} holds no single runs; measure it again with --json") from None
        found += [
            Figure(f"N={result.n} {name}", [_number(v) for v in then.get(name, ())], now[name], higher)
            for name, higher in GATED.items()
        ]
    return found


def changes(path: Path, about: dict[str, Any]) -> list[str]:
    """What an earlier file's run had otherwise: `dtype float32, now bfloat16`, `--threads 1, now 2`."""
    before = json.loads(path.read_text(encoding="utf-8"))
    named = [(name, before.get(name), about[name]) for name in ("model", "backend", "dtype", "runs")]
    settings = before.get("engine")
    for name, now in about["engine"].items():
        if isinstance(settings, dict) and name in settings and name not in ("model", "dtype"):
            named.append((flag_of(name), settings[name], now))
    return [f"{name} {then}, now {now}" for name, then, now in named if then != now]


def _number(value: Any) -> Any:
    """JSON has no nan; `write_json` wrote null."""
    return math.nan if value is None else value
