"""The highest rate of arrivals at which enough requests keep their bounds (goodput, as in DistServe)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rvllm.bench.load import Sent
from rvllm.bench.serving import GOALS, good
from rvllm.errors import UsageError

DOUBLINGS, HALVINGS = 12, 3


@dataclass(frozen=True)
class Bounds:
    """goals: what requests must keep, see `serving.good`. share: of the requests that must."""

    goals: Mapping[str, float]
    share: float


def bounds_of(words: Sequence[str], share: float) -> Bounds:
    """`ttft:500 tpot:50`, as vLLM's `--goodput` takes them. Raises UsageError."""
    given: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition(":")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = -1.0
        if name not in GOALS or not given[name] > 0:
            raise UsageError(f"--goodput: expected ttft:MS, tpot:MS or e2el:MS, got {word!r}")
    if not 0 < share <= 1:
        raise UsageError("--goodput-share must be above 0 and at most 1")
    return Bounds(given, share)


def search(
    measure: Callable[[float], Sequence[Sent]], bounds: Bounds, first: float, rows: list[dict[str, Any]]
) -> None:
    """Doubles the rate from `first` until too few keep the bounds, then halves the gap between.

    measure: sends requests at a rate (requests a second). Each rate tried is added to `rows`.
    """

    def enough(rate: float) -> bool:
        sent = measure(rate)
        share = sum(good(one, bounds.goals) for one in sent) / len(sent)
        rows.append({"rate": rate, "share": share, "kept": share >= bounds.share})
        return bool(rows[-1]["kept"])

    low, high = 0.0, first
    for _ in range(DOUBLINGS):
        if not enough(high):
            break
        low, high = high, 2 * high
    else:
        return
    for _ in range(HALVINGS):
        between = (low + high) / 2
        low, high = (between, high) if enough(between) else (low, between)


def best(rows: Sequence[dict[str, Any]]) -> float:
    """The highest rate that was kept; 0 when none was."""
    return max((row["rate"] for row in rows if row["kept"]), default=0.0)
