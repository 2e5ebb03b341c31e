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


def dips(shares: Mapping[int, float], tolerance: float = 0.1) -> list[tuple[int, float]]:
    """Points whose share lies more than `tolerance` under those of both neighbours, with the shortfall.

    shares: of the floor (or any quantity that goes smoothly) by context; its ends are not looked at.
    """
    points, found = sorted(shares), []
    for before, point, after in zip(points, points[1:], points[2:], strict=False):
        lower = min(shares[before], shares[after])
        if shares[point] < lower * (1 - tolerance):
            found.append((point, 1 - shares[point] / lower))
    return found
