"""Medians, percentiles and rates of measured samples."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, linear between neighbours; nan for no samples."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(samples: Sequence[float]) -> float:
    """The middle value; nan for no samples."""
    return percentile(samples, 50)


def rate(count: float, seconds: float) -> float:
    """`count` per second; 0 when no time has passed."""
    return count / seconds if seconds > 0 else 0.0
