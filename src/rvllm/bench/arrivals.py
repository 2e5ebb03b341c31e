"""When the requests of a load are sent: at a steady rate, or at one that grows, as vLLM's `bench`."""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

Ramp = Literal["linear", "exponential"]


@dataclass(frozen=True)
class Traffic:
    """A rate of requests.

    rate: requests a second, inf: all at once. burstiness: 1 is a Poisson process, more is steadier (the shape
    of the gamma distribution that waits are drawn from), inf: all waits alike. ramp: the rate grows from
    `rate` to `end`, from the first request to the last.
    """

    rate: float
    burstiness: float = 1.0
    ramp: Ramp | None = None
    end: float = 0.0

    def rates(self, count: int) -> list[float]:
        """Requests a second at each of `count` requests."""
        parts = [i / max(count - 1, 1) for i in range(count)]
        if self.ramp == "linear":
            return [self.rate + (self.end - self.rate) * part for part in parts]
        if self.ramp == "exponential":
            return [self.rate * (self.end / self.rate) ** part for part in parts]
        return [self.rate] * count

    def arrivals(self, count: int, seed: int) -> list[float]:
        """Seconds from the start to each of `count` requests; at a steady rate count / rate in all."""
        source = random.Random(seed)

        def wait(rate: float) -> float:
            if math.isinf(rate):
                return 0.0
            if math.isinf(self.burstiness):
                return 1.0 / rate
            return source.gammavariate(self.burstiness, 1.0 / (rate * self.burstiness))

        times = list(accumulate(map(wait, self.rates(count))))
        if self.ramp is None and times and times[-1] > 0:
            scale = count / self.rate / times[-1]
            times = [time * scale for time in times]
        return times


def rate_changes(traffic: Traffic, arrivals: Sequence[float], began: float) -> list[dict[str, Any]]:
    """When a growing rate passed each whole number; began: time.time() of the first request."""
    last = int(traffic.rate)
    found = [(last, 0.0)]
    for rate, time in zip(traffic.rates(len(arrivals)), arrivals, strict=True):
        found += [(whole, time) for whole in range(last + 1, int(rate) + 1)]
        last = max(last, int(rate))
    return [
        {"rps": rate, "timestamp": datetime.datetime.fromtimestamp(began + time).isoformat()}
        for rate, time in found
    ]
