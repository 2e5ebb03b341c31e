"""How far a fetch has come: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

Report = Callable[[str, int, int], None]
"""report(text, done, total): what is going on, bytes done so far, bytes in all (0: not known)."""

POLL_SECONDS = 0.2
LINE_SECONDS = 5.0


def silent(text: str, done: int, total: int) -> None:
    """A report that goes nowhere."""


class ProgressBar:
    """A `Report` that draws on standard error; use it in a `with` block."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._text = ""
        self._last = 0.0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, text: str, done: int, total: int) -> None:
        if self._terminal:
            self._draw(text, done, total)
        else:
            self._line(text, done, total)

    def _draw(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        if text != self._text:
            self._text = text
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(text, total=total or None)
        self._bar.update(self._task, completed=done, total=total or None)

    def _line(self, text: str, done: int, total: int) -> None:
        now = time.monotonic()
        if text == self._text and now - self._last < LINE_SECONDS:
            return
        self._text, self._last = text, now
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
        print(f"{text}: {amount}" if done or total else text, file=sys.stderr, flush=True)


def folder_bytes(folder: Path) -> int:
    """Bytes in the files below a folder, while others write to it; links are not followed."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total


@contextlib.contextmanager
def watching(folder: Path, report: Report, text: str, total: int, before: int = 0) -> Iterator[None]:
    """Reports the growth of a folder that someone else downloads into.

    before: bytes already done when the folder held what it holds now.
    """
    start, done = folder_bytes(folder), threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            grown = before + folder_bytes(folder) - start
            report(text, min(max(grown, before), total) if total else grown, total)

    report(text, before, total)
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
