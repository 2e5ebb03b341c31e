"""What of a GPU decides between kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceInfo:
    """What of the GPU decides between kernels."""

    capability: int
    sm_count: int
    smem_per_block: int
