"""Points of a curve that lie below what their neighbours promise."""

from __future__ import annotations

from collections.abc import Mapping


def cliffs(rates: Mapping[int, float], tolerance: float = 0.1) -> list[tuple[int, float]]:
    """Batch sizes whose rate lies more than `tolerance` under that of any smaller batch, with the shortfall.

    rates: tokens a second (or any rate that must not fall) by batch size. A shortfall of 0.12 is 12 % less
    than the best of the smaller sizes.
    """
    best, found = 0.0, []
    for size in sorted(rates):
        rate = rates[size]
        if rate < best * (1 - tolerance):
            found.append((size, 1 - rate / best))
        best = max(best, rate)
    return found
