"""Plain text tables and human sizes for commands that print lists."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence


def human_bytes(count: float) -> str:
    """1536000 → `1.54 MB` (powers of ten)."""
    return f"{count:.0f} B" if abs(count) < 1000 else _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def human_flops(count: float) -> str:
    """2_500_000 → `2.5 M`."""
    return _scaled(count, ("", "k", "M", "G", "T", "P")).strip()


def _scaled(count: float, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {largest}"


def human_seconds(seconds: float) -> str:
    """0.00042 → `420 µs`."""
    for scale, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns; those in `right` are aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def facts(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A titled list of names and values."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)])


def wrapped(line: str, indent: int) -> str:
    """A line broken between words to the terminal's width; what follows is indented."""
    return textwrap.fill(
        line,
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
