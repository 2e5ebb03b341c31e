"""Line charts and bars as SVG, so that a report needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 360, 70, 40, 46
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
Curve = Sequence[tuple[float, float, float, float]]  # x, y, smallest, largest


def lines(title: str, x_name: str, y_name: str, curves: Mapping[str, Curve]) -> str:
    """Curves over x (logarithmic) from zero up, with a bar from smallest to largest at each point."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    low, high = (math.log2(edge(p[0] for p in points)) for edge in (min, max))
    top = _round_up(max(p[3] for p in points))
    width = WIDTH - LEFT - 20

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return LEFT + 10 + share * (width - 20), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = _frame(title, y_name, top)
    for x in sorted({p[0] for p in points}):
        parts.append(_text(place(x, 0)[0], HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    parts.append(_text(LEFT + width / 2, HEIGHT - 8, x_name, "middle"))
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        at = [place(x, y) for x, y, _, _ in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (value, _, least, most) in zip(at, curve, strict=True):
            (_, y0), (_, y1) = place(value, least), place(value, most)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<path d="M{x:.1f} {y0:.1f}V{y1:.1f}" stroke="{colour}"/>')
        parts.append(_legend(number, name, colour))
    return _page(parts)


def bars(title: str, y_name: str, values: Mapping[str, tuple[float, float, float]]) -> str:
    """A bar for each name: (value, smallest, largest)."""
    if not values:
        return ""
    top = _round_up(max(most for _, _, most in values.values()))
    parts = _frame(title, y_name, top)
    step = (WIDTH - LEFT - 20) / len(values)
    scale = (HEIGHT - TOP - BOTTOM) / top
    for number, (name, (value, least, most)) in enumerate(values.items()):
        x, base = LEFT + step * (number + 0.5), HEIGHT - BOTTOM
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<rect x="{x - step / 4:.1f}" y="{base - value * scale:.1f}" width="{step / 2:.1f}" '
            f'height="{value * scale:.1f}" fill="{colour}"/>'
        )
        parts.append(
            f'<path d="M{x:.1f} {base - least * scale:.1f}V{base - most * scale:.1f}" stroke="black"/>'
        )
        parts.append(_text(x, base - value * scale - 6, f"{value:.3g}", "middle"))
        parts.append(_text(x, base + 16, name, "middle"))
    return _page(parts)


def _frame(title: str, y_name: str, top: float) -> list[str]:
    parts = [_text(WIDTH / 2, 20, title, "middle", 14), _text(6, TOP - 8, y_name, "start")]
    for step in range(5):
        y = HEIGHT - BOTTOM - step / 4 * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#ccc"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{top * step / 4:.4g}", "end"))
    return parts


def _legend(number: int, name: str, colour: str) -> str:
    y = TOP + 8 + 16 * number
    mark = f'<rect x="{LEFT + 12}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
    return mark + _text(LEFT + 27, y + 1, name, "start")


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _page(parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10) if step * power >= value * 0.999)
