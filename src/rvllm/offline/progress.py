"""Progress bars on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WIDTH = 30


@contextmanager
def loading_bar() -> Iterator[Callable[[float, str], None]]:
    """A progress line on a terminal while the model loads, silent elsewhere; yields `show(0 to 1, text)`."""
    shown, terminal = False, sys.stderr.isatty()

    def show(fraction: float, text: str) -> None:
        nonlocal shown
        if terminal:
            done = round(WIDTH * min(max(fraction, 0.0), 1.0))
            bar = "━" * done + "·" * (WIDTH - done)
            print(f"\r\x1b[K{bar} {fraction:4.0%} {text}", end="", file=sys.stderr, flush=True)
            shown = True

    try:
        yield show
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int, bool], None]]:
    """A bar over requests with the rate of output tokens; yields `advance(new tokens, request done)`."""
    if not show or not sys.stderr.isatty():
        yield lambda tokens, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total, rate="")
        started, tokens_out = time.perf_counter(), 0

        def advance(tokens: int, done: bool) -> None:
            nonlocal tokens_out
            tokens_out += tokens
            rate = tokens_out / max(time.perf_counter() - started, 1e-9)
            bar.update(task, advance=int(done), rate=f"{rate:,.0f} tok/s")

        yield advance
