"""`rvllm top`: a running server's engine in the terminal, as the page shows it in a browser."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rvllm.cli.common.blockmap import COLOURS, block_map, colours_of
from rvllm.cli.common.remote import add_server, ask_json
from rvllm.cli.common.tables import human_bytes, human_seconds
from rvllm.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 64  # of bars and maps, in characters
WINDOW = 3.0  # seconds over which rates are taken
BARS = " ▁▂▃▄▅▆▇█"
State = dict[str, Any]  # api.page.EngineView as JSON


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("top", help="watch a running server's engine", allow_abbrev=False)
    add_server(parser)
    parser.add_argument("--interval", default="1", metavar="SECONDS", help="between two looks, 0.2 to 60 [1]")
    parser.add_argument("--once", action="store_true", help="print one look and end")


def main(args: argparse.Namespace) -> int:
    """Shows the engine until Ctrl-C, or once. Raises RvllmError when the server cannot be reached."""
    interval = _interval(args.interval)
    key = args.api_key or os.environ.get("RVLLM_API_KEY")

    def look() -> State:
        state: State = ask_json(args.url, "/rvllm/state", key)
        return state

    from rich.console import Console

    history = History()
    if args.once or not sys.stdout.isatty():
        first = look()
        if args.once and first["stats"]["running"]:  # a rate needs two looks
            history.add(first)
            time.sleep(min(interval, 1.0))
            first = look()
        Console().print(picture(first, history.add(first)))
        return 0
    from rich.live import Live

    with Live(screen=True, auto_refresh=False) as live:
        while True:
            state = look()
            live.update(picture(state, history.add(state)), refresh=True)
            time.sleep(interval)


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.2 <= value <= 60:
        raise UsageError(f"--interval: expected 0.2 to 60 seconds, got {text!r}")
    return value


@dataclass
class Rates:
    """What happens a second; idle: share of the time without work, None before the second look.

    recent: tokens generated a second at the last looks.
    """

    generated: float = 0.0
    prompt: float = 0.0
    steps: float = 0.0
    idle: float | None = None
    recent: list[float] = field(default_factory=list)


class History:
    """The last few states, to take rates from."""

    def __init__(self) -> None:
        self._states: deque[State] = deque()
        self._recent: deque[float] = deque(maxlen=16)

    def add(self, state: State) -> Rates:
        """Takes a state; the rates since those of some seconds ago."""
        states = self._states
        if states and states[-1]["stats"]["steps"] > state["stats"]["steps"]:
            states.clear()  # another engine answers
        states.append(state)
        while len(states) > 2 and state["time"] - states[1]["time"] >= WINDOW:
            states.popleft()
        old, new, span = states[0]["stats"], state["stats"], state["time"] - states[0]["time"]
        if span <= 0:
            return Rates(recent=list(self._recent))
        loop = new["loop_seconds"] - old["loop_seconds"]
        generated = (new["generation_tokens"] - old["generation_tokens"]) / span
        self._recent.append(generated)
        return Rates(
            generated,
            (new["prompt_tokens"] - old["prompt_tokens"]) / span,
            (new["steps"] - old["steps"]) / span,
            (new["idle_seconds"] - old["idle_seconds"]) / loop if loop > 0 else None,
            list(self._recent),
        )


def picture(state: State, rates: Rates) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    head = Text.assemble(
        ("rvllm ", "bold"), f"{state['version']} · ", (state["model"], "bold"),
        f" · {state['architecture']} · {state['backend']}, {state['dtype']} · up {_span(state['uptime'])}",
    )  # fmt: skip
    head.overflow, head.no_wrap = "ellipsis", True
    return Group(head, Text(), _figures(state, rates), Text(), _requests(state), Text(),
                 _row("blocks", block_map(state, WIDTH)),
                 _memory(state), _kernels(state))  # fmt: skip


def _figures(state: State, rates: Rates) -> RenderableType:
    from rich.table import Table

    stats, floor = state["stats"], state["floor_seconds"]
    limit = stats["running"] / floor if floor else None
    against = f"{rates.generated / limit:.0%} of the limit, {limit:,.0f}" if limit else ""
    if limit and state["floor_ratio"] is not None:
        against += f" (decode steps {state['floor_ratio']:.0%})"
    blocks, total = stats["blocks_used"], max(1, stats["blocks_total"])
    hits = stats["cached_prompt_tokens"] / stats["prefix_queries"] if stats["prefix_queries"] else 0.0
    grid = Table.grid(padding=(0, 3))
    rows = [
        ("generated", f"{rates.generated:,.1f} tokens/s", f"{against} {_sparkline(rates.recent)}".strip()),
        ("prompts", f"{rates.prompt:,.1f} tokens/s", f"{hits:.0%} of prompt tokens found cached"),
        ("requests", f"{stats['running']} running",
         f"{stats['waiting']} waiting, {stats['preemptions']} preempted"),
        ("KV blocks", f"{_bar(blocks / total)} {blocks / total:.0%}",
         f"{blocks:,} of {total:,}, {stats['blocks_cached']:,} free with a prefix"),
        *_second_tier(stats),
        ("idle", "–" if rates.idle is None else f"{rates.idle:.0%}", f"{rates.steps:,.1f} steps/s"),
    ]  # fmt: skip
    for name, value, detail in rows:
        grid.add_row(f"[dim]{name}[/dim]", f"[bold]{value}[/bold]", f"[dim]{detail}[/dim]")
    return grid


def _second_tier(stats: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The line of the KV blocks in host memory, if there are any."""
    used, total = stats["cpu_blocks_used"], stats["cpu_blocks_total"]
    if not total:
        return []
    moved = f"{stats['blocks_moved_out']:,} moved there, {stats['blocks_moved_in']:,} came back"
    told = f"{used:,} of {total:,} hold a prefix, {moved}"
    return [("in host", f"{_bar(used / total)} {used / total:.0%}", told)]


def _requests(state: State) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not state["sequences"]:
        return Text("no request is alive", style="dim")
    colours = colours_of(state["sequences"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("request", no_wrap=True)
    for name in ("", "prompt", "cached", "output", "blocks", "queued", "age"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for one in state["sequences"][:20]:
        doing = "waiting" if not one["running"] else "decoding" if one["output_tokens"] else "prefill"
        table.add_row(
            Text(_short(one["id"]), colours.get(one["id"], "")), doing,
            str(one["prompt_tokens"]), str(one["cached_tokens"]),
            f"{one['output_tokens']}/{one['max_tokens']}", str(len(one["blocks"])), _span(one["queued"]),
            _span(one["age"]),
        )  # fmt: skip
    return table


def _memory(state: State) -> RenderableType:
    """The ledger as a bar, each line of it in a colour, and what the colours are."""
    from rich.text import Text

    lines = [line for line in state["ledger"] if line["bytes"]]
    total = sum(line["bytes"] for line in lines)
    text = Text()
    if not total:
        return _row("memory", text.append("nothing listed"))
    colours = ["dim" if line["name"] == "free" else COLOURS[i % len(COLOURS)] for i, line in enumerate(lines)]
    for line, colour in zip(lines, colours, strict=True):
        text.append("█" * max(1, round(WIDTH * line["bytes"] / total)), colour)
    text.append("\n")
    for i, (line, colour) in enumerate(zip(lines, colours, strict=True)):
        text.append(" · " if i else "", "dim").append("█\N{NO-BREAK SPACE}", colour)
        text.append(f"{line['name']} {human_bytes(line['bytes'])}")
    return _row("memory", text)


def _row(name: str, what: RenderableType) -> RenderableType:
    """A name, and beside it what it names, wrapped within its own column."""
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(width=9, no_wrap=True)
    grid.add_row(f"[dim]{name}[/dim]", what)
    return grid


def _kernels(state: State) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    settings = " · ".join(f"{name} {value}" for name, value in state["settings"].items())
    matrices = [k for k in state["kernels"] if k["strategy"]]
    others: dict[str, int] = {}
    for kernel in state["kernels"]:
        if not kernel["strategy"]:
            others[kernel["kernel"]] = others.get(kernel["kernel"], 0) + kernel["count"]
    most = sorted(others.items(), key=lambda item: -item[1])[:8]
    lines = [f"{k['op']:<14} {k['strategy']:<9} {k['kernel']} ×{k['count']}" for k in matrices]
    rest = " · ".join(f"{name} ×{count}" for name, count in most)
    return Group(
        _row("settings", Text(settings)),
        _row("matrices", Text("\n".join(lines) or "no step yet")),
        _row("others", Text(rest or "none")),
    )


def _short(request_id: str) -> str:
    """The beginning of an id and the numbers of prompt and choice behind it, as the page names requests."""
    head, *numbers = request_id.rsplit("-", 2)
    word = head.rpartition("-")[2]
    return "-".join([word[:8], *numbers]) if len(request_id) > 20 and len(numbers) == 2 else request_id[:20]


def _bar(share: float) -> str:
    filled = round(12 * min(1.0, share))
    return "█" * filled + "░" * (12 - filled)


def _sparkline(values: list[float]) -> str:
    top = max(values, default=0.0)
    if not top:
        return ""
    return "".join(BARS[round((len(BARS) - 1) * value / top)] for value in values)


def _span(seconds: float) -> str:
    if seconds < 120:
        return human_seconds(seconds)
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
