"""Progress bars on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading_bar() -> Iterator[Callable[[float, str], None]]:
    """A bar for the model's loading on a terminal; yields `report(fraction, what is being done)`."""
    if not sys.stderr.isatty():
        yield lambda fraction, text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)


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
