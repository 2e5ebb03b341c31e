"""One token's products, several a launch: their kernels. The sizes are those of `step.cuh`."""

from __future__ import annotations

from collections.abc import Iterator

from rvllm.kernels.constants import constants
from rvllm.kernels.gemm.tiles import DTYPES, SMEM_LIMIT, TILE, TILE_BYTES
from rvllm.kernels.spec import Folder, KernelSpec

_SIZES = constants("decode/step.cuh")
WARPS = _SIZES["WARPS"]  # of a block
SLOTS = (10, 3)  # pieces of a weight that a group of warps has in flight
ROWS = _SIZES["ROWS"]  # of a weight that a group of warps takes at a time
SLICE_BYTES = _SIZES["SLICE"] * TILE * 2  # of the rows of one warp and the columns of a tile
MAX_STEPS = _SIZES["MAX_STEPS"]  # of a launch
MAX_ENTRIES = _SIZES["MAX_ENTRIES"]  # experts of a token
MAX_NORM_WIDTH = (
    constants("decode/row.cuh")["NORM_PARTS"] * 8 * _SIZES["THREADS"]
)  # of a row to be normalised
_ONE = constants("decode/one_token_sm90.cu")
ONE_THREADS = _ONE["ONE_CONSUMERS"] + 32
ONE_STAGE, ONE_TAIL = 2 * TILE_BYTES, 4608  # bytes; mirrors OneTail
ONE_NORM_WIDTH = 8 * _ONE["ONE_VECTORS"] * _ONE["ONE_CONSUMERS"]  # of a row to be normalised
_STATIC_SMEM = {"": 1024, "_moe": 4096}


def static_smem(suffix: str) -> int:
    """Shared memory that the kernels of that suffix declare."""
    return _STATIC_SMEM[suffix]


def ring_bytes(slots: int) -> int:
    """Shared memory of a block's pieces in flight."""
    return WARPS * slots * SLICE_BYTES


def one_token_kernel(dtype: str, split: bool) -> str:
    """The kernel of one_token_sm90.cu for weights of several segments, or of one."""
    return f"sm90_{dtype}_one_token_{'split' if split else 'walk'}"


def _one_token(dtype: str) -> Iterator[KernelSpec]:
    for split in (False, True):
        symbol = f"rvllm::gemm::one_token<rvllm::{dtype}, {str(split).lower()}>"
        name = one_token_kernel(dtype, split)
        yield Folder("decode").kernel(name, "one_token_sm90", symbol, SMEM_LIMIT, 0, dtype)


SPECS: list[KernelSpec] = [
    *(spec for dtype in DTYPES for spec in _one_token(dtype)),
    *(
        Folder("decode", "rvllm::decode::").kernel(
            f"sm80_{dtype}_chain{suffix}_s{slots}",
            "chain",
            f"chain<rvllm::{dtype}, {slots}, {str(bool(suffix)).lower()}>",
            SMEM_LIMIT - static,
            static,
            f"{dtype}{suffix}_{slots}",
        )
        for dtype in DTYPES
        for suffix, static in _STATIC_SMEM.items()
        for slots in SLOTS
    ),
]
