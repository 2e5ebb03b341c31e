"""Stop strings in a stream of text: found across pieces, cut exactly, nothing shown too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Watches a text that comes in pieces for the first stop string to be complete.

    Which one is found does not depend on how the text is cut into pieces: the one that ends first, and of
    those ending at the same character the longest.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, final: bool = False) -> str:
        """The text that is safe to show; a tail that may be the start of a stop string is held back.

        After a stop string is found, `found` is set, nothing follows, and the text ended before it (after
        it with `include`). final: no more text comes, so nothing is held back.
        """
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        self._held = ""
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, start, self.found = min(matches)
            return text[: end if self._include else start]
        keep = len(text) if final else first_possible(text, self._stops)
        self._held = text[keep:]
        return text[:keep]


def first_possible(text: str, marks: Sequence[str]) -> int:
    """Where the earliest tail begins that is the start of one of `marks`; the text's length if none is."""
    first = len(text)
    for mark in marks:
        at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
        while 0 <= at < first:
            if mark.startswith(text[at:]):
                first = at
                break
            at = text.find(mark[0], at + 1)
    return first
