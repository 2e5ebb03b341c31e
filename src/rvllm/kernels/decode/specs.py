"""One token's products, several a launch: their kernels. The sizes are those of `step.cuh`."""

from __future__ import annotations

from rvllm.kernels.gemm.tiles import DTYPES, SMEM_LIMIT
from rvllm.kernels.spec import KernelSpec

WARPS = 8  # of a block
SLOTS = (10, 3)  # pieces of a weight that a group of warps has in flight
ROWS = 32  # of a weight that a group of two takes at a time
SLICE_BYTES = 2048  # of the rows of one warp and 64 columns
MAX_STEPS = 8  # of a launch
MAX_ENTRIES = 32  # experts of a token
MAX_NORM_WIDTH = 8192  # of a row that is normalised in front of a product
_STATIC_SMEM = {"": 1024, "_moe": 4096}


def static_smem(suffix: str) -> int:
    """Shared memory that the kernels of that suffix declare."""
    return _STATIC_SMEM[suffix]


def ring_bytes(slots: int) -> int:
    """Shared memory of a block's pieces in flight."""
    return WARPS * slots * SLICE_BYTES


SPECS: list[KernelSpec] = [
    KernelSpec(
        name=f"sm80_{dtype}_chain{suffix}_s{slots}",
        source="decode/chain.cu",
        symbol=f"rvllm::decode::chain<rvllm::{dtype}, {slots}, {str(bool(suffix)).lower()}>",
        smem=SMEM_LIMIT - static,
        static_smem=static,
        unit=f"{dtype}{suffix}_{slots}",
    )
    for dtype in DTYPES
    for suffix, static in _STATIC_SMEM.items()
    for slots in SLOTS
]
