"""An answer in Markdown on a terminal, as it comes: finished blocks stay, the one that grows is redrawn."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console
    from rich.markdown import Markdown

MIN_SECONDS = 0.04  # between two drawings
CODE_COLOURS = "ansi_dark"  # the terminal's own colours, so that they fit its background
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_GOES_ON = re.compile(r" |\t|[-*+] |\d{1,9}[.)] |>")  # a line that may belong to the list before it


class MarkdownView:
    """Shows an answer; use it in a `with` block, which leaves the whole answer on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.theme import Theme

        theme = Theme({"markdown.code": "bold cyan", "markdown.code_block": "none"})
        self._console = console or Console(highlight=False, theme=theme)
        if console is not None:
            console.push_theme(theme)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._text, self._done, self._drawn = "", 0, 0.0

    def __enter__(self) -> MarkdownView:
        self._live.start()
        return self

    def add(self, text: str) -> None:
        """Takes the next piece of the answer."""
        self._text += text
        if (now := time.monotonic()) < self._drawn + MIN_SECONDS:
            return
        self._drawn = now
        end = finished_up_to(self._text, self._done)
        if end > self._done:
            block, self._done = self._text[self._done : end], end
            self._live.update("")
            self._console.print(_rendered(block))
        self._live.update(self._tail(), refresh=True)

    def _tail(self) -> Markdown:
        """The end of what grows, as far as it fits on the screen: above it nothing can be drawn again."""
        lines = self._text[self._done :].splitlines()
        return _rendered("\n".join(lines[-max(1, self._console.height - 2) :]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update("")
        self._live.stop()
        if self._text[self._done :].strip():
            self._console.print(_rendered(self._text[self._done :]))


def _rendered(text: str) -> Markdown:
    from rich.markdown import Markdown

    return Markdown(text.strip("\n"), code_theme=CODE_COLOURS, hyperlinks=False)


def finished_up_to(text: str, start: int) -> int:
    """Where the last block of `text[start:]` ends that cannot change any more.

    That is behind an empty line outside code whose next line has come and belongs to no list or quotation.
    """
    fence, end, at = "", start, start
    lines = text[start:].split("\n")[:-1]  # the last one may still grow
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        at += len(line) + 1
        mark = _FENCE.match(line)
        if fence:
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif mark:
            fence = mark[1]
        elif not line.strip() and following.strip() and not _GOES_ON.match(following):
            end = at
    return end
