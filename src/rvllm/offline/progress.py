"""Progress bars on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LoadingBar:
    """A progress line on a terminal while the model loads; silent elsewhere."""

    WIDTH = 30

    def __init__(self) -> None:
        self._shown = False
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> LoadingBar:
        return self

    def show(self, fraction: float, text: str) -> None:
        """Draws the bar at `fraction` (0 to 1)."""
        if self._terminal:
            done = round(self.WIDTH * min(max(fraction, 0.0), 1.0))
            bar = "━" * done + "·" * (self.WIDTH - done)
            print(f"\r\x1b[K{bar} {fraction:4.0%} {text}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown:
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
