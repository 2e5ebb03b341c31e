"""The KV block map of `rvllm top`: who holds which blocks, one mark each where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta",
           "bright_yellow", "bright_green")  # fmt: skip
HELD, SHARED, CACHED, EMPTY = "■", "◆", "▪", "·"
MAX_LINES = 4


def colours_of(sequences: list[dict[str, Any]]) -> dict[str, str]:
    """A colour for each sequence that runs, in order."""
    running = [one["id"] for one in sequences if one["running"]]
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(running)}


def block_map(state: dict[str, Any], width: int = 76) -> Text:
    """The blocks in order, `width` marks a line.

    A mark stands for one block, or for several when there are too many: the busiest of them is shown.
    """
    from rich.text import Text

    colours, owners = colours_of(state["sequences"]), _owners(state["sequences"])
    cached, total = set(state["cached_blocks"]), state["num_blocks"]
    each = max(1, -(-total // (width * MAX_LINES)))
    text = Text()
    for mark, start in enumerate(range(0, total, each)):
        if mark and mark % width == 0:
            text.append("\n")
        blocks = range(start, min(total, start + each))
        held = max((owners.get(block, ()) for block in blocks), key=len)
        if held:
            text.append(SHARED if len(held) > 1 else HELD, colours.get(held[0], "white"))
        else:
            text.append(CACHED if not cached.isdisjoint(blocks) else EMPTY, "dim")
    text.append("\n")
    text.append_text(Text(" · ".join(_legend(owners, each)), "dim"))
    return text


def _owners(sequences: list[dict[str, Any]]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for one in sequences:
        for block in one["blocks"]:
            owners.setdefault(block, []).append(one["id"])
    return owners


def _legend(owners: dict[int, list[str]], each: int) -> Iterator[str]:
    shared = sum(len(names) > 1 for names in owners.values())
    yield f"{HELD} of one sequence, {SHARED} shared ({shared})"
    yield f"{CACHED} free with a prefix, {EMPTY} empty"
    if each > 1:
        yield f"a mark is {each} blocks"
