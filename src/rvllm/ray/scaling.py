"""How many replicas there should be, from what requests and KV caches say. Nothing here imports Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

KV_USE = "kv_use"
HEADROOM = 0.1  # a replica less must leave so much below the target, or the count would swing


def desired_replicas(
    now: int, requests: float, kv_use: Mapping[str, float], target_requests: float, target_kv_use: float
) -> int:
    """How many replicas bring both the requests and the KV use of each to their targets.

    now: replicas that run. requests: running and waiting, of all. kv_use: share of blocks in use, by replica.
    """
    load = max(requests / target_requests, sum(kv_use.values()) / target_kv_use)
    wanted = max(1, math.ceil(load))
    if wanted < now and load > wanted * (1 - HEADROOM):
        return wanted + 1
    return wanted


class ScalePolicy:
    """Ray's autoscaling policy, made in its controller; Ray itself applies the limits and the delays."""

    def __init__(self, target_requests: float, target_kv_use: float) -> None:
        self._targets = (target_requests, target_kv_use)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """(replicas, state to keep) from Ray's AutoscalingContext."""
        uses = (context.aggregated_metrics or {}).get(KV_USE, {})
        found = desired_replicas(
            context.current_num_replicas,
            context.total_num_requests,
            {str(name): float(use) for name, use in uses.items()},
            *self._targets,
        )
        return found, {}
