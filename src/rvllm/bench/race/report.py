"""A race as JSON, Markdown and plots. Losses are listed; what was not measured says why."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvllm.bench.files import json_text, write_whole
from rvllm.bench.gate import Figure, spread
from rvllm.bench.race import plot
from rvllm.bench.race.goodput import best
from rvllm.bench.race.measure import Entry, middle
from rvllm.bench.stats import median
from rvllm.errors import UsageError

BUSY_CLIENT = 0.8  # of a core: from here on the load may be what is slow


@dataclass(frozen=True)
class Kind:
    """A figure: how it is titled, where it lies in an entry, whether more is better."""

    title: str
    way: str
    name: str
    more: bool


KINDS = (
    Kind("Output tokens a second, over HTTP", "http", "tokens_per_s", True),
    Kind("Output tokens a second, without HTTP", "direct", "tokens_per_s", True),
    Kind("Time to first token over HTTP, ms (median of the requests)", "http", "ttft_ms", False),
    Kind("Time to first token over HTTP, ms (99th percentile)", "http", "ttft_p99_ms", False),
    Kind("Time per later token over HTTP, ms", "http", "tpot_ms", False),
    Kind("Gap between deltas over HTTP, ms (99th percentile)", "http", "itl_p99_ms", False),
    Kind("Time until all have a token without HTTP, ms", "direct", "first_ms", False),
)
GATED = (KINDS[0], KINDS[2], KINDS[4])


@dataclass(frozen=True)
class Loss:
    """A cell where another engine's median is better; clear: their ranges do not touch."""

    cell: str
    other: str
    ratio: float  # ours in its favour: 0.8 is 20 % behind
    clear: bool


def losses(entries: Sequence[Entry]) -> list[Loss]:
    """Every cell in which the first entry is behind any other, by however little."""
    ours, *others = entries
    found = []
    for cell, more, values in cells(entries):
        for other in others:
            mine, theirs = values.get(ours.name, []), values.get(other.name, [])
            if not mine or not theirs:
                continue
            a, b = (median(mine), median(theirs)) if more else (median(theirs), median(mine))
            if a < b:
                apart = max(mine) < min(theirs) if more else min(mine) > max(theirs)
                found.append(Loss(cell, other.name, a / b if b else 0.0, apart))
    return sorted(found, key=lambda loss: loss.ratio)


def cells(entries: Sequence[Entry]) -> Iterator[tuple[str, bool, dict[str, list[float]]]]:
    """(what, whether more is better, samples by engine) of everything that is compared."""
    for kind in KINDS:
        for size in sizes(entries, kind.way):
            yield f"{kind.title}, N={size}", kind.more, {e.name: _samples(e, kind, size) for e in entries}
    yield "Start to ready, s", False, {e.name: e.started for e in entries}
    yield "Start to first token, s", False, {e.name: e.first_token for e in entries}
    yield "Memory after the runs, bytes", False, {e.name: e.memory for e in entries if any(e.memory)}
    yield "Installed size, bytes", False, {e.name: [float(e.size_bytes)] for e in entries if e.size_bytes}
    yield "Goodput, requests/s", True, {e.name: [best(e.goodput)] for e in entries if e.goodput}


def sizes(entries: Sequence[Entry], way: str) -> list[int]:
    """Batch sizes that any engine has."""
    return sorted({size for entry in entries for size in getattr(entry, way)})


def _samples(entry: Entry, kind: Kind, size: int) -> list[float]:
    found: Mapping[str, list[float]] = getattr(entry, kind.way).get(size, {})
    return [value for value in found.get(kind.name, []) if math.isfinite(value)]


def figures(entries: Sequence[Entry], other: Entry) -> list[Figure]:
    """The first entry's figures over HTTP beside another's, for a gate. Raises UsageError when one failed."""
    ours = entries[0]
    for entry in (ours, other):
        if entry.absent.get("http"):
            raise UsageError(f"the gate has no figures: {entry.absent['http']}")
    found = [
        Figure(
            f"{other.name} N={size} {kind.name}",
            _samples(other, kind, size),
            _samples(ours, kind, size),
            kind.more,
        )
        for kind in GATED
        for size in sizes([ours], "http")
    ]
    served = [1.0] * max(3, len(ours.started))
    wrong = ours.failed + ours.wrong_length > other.failed + other.wrong_length
    return [*found, Figure(f"{other.name} answers", served, [0.0 if wrong else 1.0] * len(served), True)]


def markdown(about: Mapping[str, Any], entries: Sequence[Entry], plots: Sequence[str]) -> str:
    ours = entries[0]
    work, machine = about["workload"], about["machine"]
    gpus = "; ".join(machine["gpus"]) or "no GPU"
    out = [
        f"# {about['model_name']}: {', '.join(e.name for e in entries)}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 1e9:.0f} GB; {gpus}; "
        f"{machine['system']}; load {machine['load']} before and {about['load_after']} after.",
        f"Prompts: {work['kind']}, {work['input_len']} tokens in, {work['output_len']} out, greedy; "
        f"N requests at once. Engines in turns ({about['turns']}), each started alone, warmed up, then "
        f"{about['runs']} run(s) a size: median (smallest - largest) of the runs.",
        "",
        f"    {about['command']}",
        "",
        *_table(("engine", "version"), [(e.name, e.version) for e in entries]),
    ]
    for kind in KINDS:
        if any(_samples(e, kind, n) for e in entries for n in sizes(entries, kind.way)):
            out += ["", f"## {kind.title}", "", *_kind(kind, entries)]
    if any(e.started or e.size_bytes for e in entries):
        out += ["", "## Start, memory, size", "", *_whole(entries)]
    if any(e.goodput for e in entries):
        out += ["", "## Goodput", "", *_goodput(about, entries)]
    out += ["", f"## Where {ours.name} is behind", "", *_losses(entries)]
    out += ["", "## What to know", "", *_notes(machine, entries)]
    if plots:
        out += ["", *[f"![{name}]({name})" for name in plots]]
    return "\n".join(out) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(head) + " |"
    under = "| --- |" + " ---: |" * (len(head) - 1)
    return [line, under, *["| " + " | ".join(row) + " |" for row in rows]]


def _range(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    middle_value = shown(median(values))
    return (
        middle_value if len(values) == 1 else f"{middle_value} ({shown(min(values))} - {shown(max(values))})"
    )


def shown(value: float) -> str:
    """Three digits, or whole numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _kind(kind: Kind, entries: Sequence[Entry]) -> list[str]:
    ours, *others = entries
    rows = []
    for size in sizes(entries, kind.way):
        values = [_samples(entry, kind, size) for entry in entries]
        ratios = []
        for other in values[1:]:
            if not values[0] or not other or not median(values[0]) or not median(other):
                ratios.append("-")
                continue
            a, b = (median(values[0]), median(other)) if kind.more else (median(other), median(values[0]))
            ratios.append(f"{a / b:.2f}x")
        rows.append([str(size), *map(_range, values), *ratios])
    return _table(["N", *[e.name for e in entries], *[f"{ours.name} to {o.name}" for o in others]], rows)


def _whole(entries: Sequence[Entry]) -> list[str]:
    rows = [
        (e.name, _range(e.started), _range(e.first_token),
         f"{median(e.memory) / 1e6:,.0f} MB" if any(e.memory) else "not measured",
         f"{e.size_bytes / 1e6:,.0f} MB" if e.size_bytes else "not measured")
        for e in entries
    ]  # fmt: skip
    return _table(
        ("engine", "start to ready, s", "start to first token, s", "memory after", "installed"), rows
    )


def _goodput(about: Mapping[str, Any], entries: Sequence[Entry]) -> list[str]:
    lines = [f"{about['goodput']}: requests a second, Poisson arrivals, the same for all.", ""]
    rows = [(e.name, shown(best(e.goodput)),
             ", ".join(f"{shown(row['rate'])}: {row['share']:.0%}" for row in e.goodput))
            for e in entries]  # fmt: skip
    return lines + _table(("engine", "highest rate kept", "rates tried: share in time"), rows)


def _losses(entries: Sequence[Entry]) -> list[str]:
    if len(entries) == 1:
        return ["Nobody else took part."]
    found = losses(entries)
    if not found:
        return ["In no cell above."]
    return [
        f"- {loss.cell}: {loss.ratio:.2f}x of {loss.other}"
        + ("" if loss.clear else " (the ranges of the runs touch)")
        for loss in found
    ]


def _notes(machine: Mapping[str, Any], entries: Sequence[Entry]) -> list[str]:
    lines = []
    if machine["load"] > machine["cores"] / 2:
        lines.append(
            f"- other work had the cores (load {machine['load']} on {machine['cores']} beforehand), "
            "which one engine may bear worse than another"
        )
    for e in entries:
        lines += [f"- not measured: {reason}" for reason in e.absent.values()]
        if e.failed:
            lines.append(f"- {e.name}: {e.failed} requests failed")
        if e.wrong_length:
            lines.append(f"- {e.name}: {e.wrong_length} answers had another length than asked")
        busy = [size for size, samples in e.http.items() if middle(samples, "client_share") > BUSY_CLIENT]
        if busy:
            lines.append(
                f"- {e.name}: the client itself used most of a core at N={', '.join(map(str, busy))}"
            )
        noisy = [
            n for n, s in e.http.items() if len(s["tokens_per_s"]) > 1 and spread(s["tokens_per_s"]) > 0.2
        ]
        if noisy:
            lines.append(f"- {e.name}: its runs lie more than 20 % apart at N={', '.join(map(str, noisy))}")
        if e.size_of:
            lines.append(
                f"- {e.name}: the installed size is that of {len(e.size_of)} path(s) of its environment"
            )
    return lines or ["Nothing."]


def write(folder: Path, about: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Writes report.json, report.md and the plots. Raises UsageError when that cannot be."""
    drawn = {name: text for name, text in _plots(entries).items() if text}
    told = {**about, "engines": [entry.told() for entry in entries]}
    files = {
        "report.json": json_text(told),
        "report.md": markdown(about, entries, list(drawn)),
        **drawn,
    }
    for name, text in files.items():
        write_whole(folder / name, text, "--out")


def make_folder(folder: Path) -> None:
    """Before anything is measured. Raises UsageError where no report can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot make {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out: cannot write into {folder}")


def _plots(entries: Sequence[Entry]) -> dict[str, str]:
    found = {}
    for kind in (*KINDS[:3], KINDS[4]):
        curves = {}
        for entry in entries:
            have = [(n, _samples(entry, kind, n)) for n in sizes([entry], kind.way)]
            curve = [(float(n), median(values), min(values), max(values)) for n, values in have if values]
            if curve:
                curves[entry.name] = curve
        found[f"{kind.way}-{kind.name}.svg"] = plot.lines(kind.title, "requests at once", "", curves)
    starts = {
        e.name: (median(e.first_token), min(e.first_token), max(e.first_token))
        for e in entries
        if e.first_token
    }
    found["start.svg"] = plot.bars("Start to first token", "s", starts)
    weights = {e.name: (e.size_bytes / 1e6,) * 3 for e in entries if e.size_bytes}
    found["size.svg"] = plot.bars("Installed size", "MB", weights)
    return found
