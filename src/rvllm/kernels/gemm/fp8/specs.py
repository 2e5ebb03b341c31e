"""The kernels of E4M3 weights: names, instantiations and the constants that their plans need.

The modes are described in gemm/fp8/gemm_sm90.cu; `backends/cuda/formats/fp8.py` chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator

from rvllm.kernels.gemm.tiles import (
    BARRIERS,
    DTYPES,
    PARTIAL_PITCH,
    SM80_TOKENS,
    SMEM_LIMIT,
    SOURCES,
    TILE_BYTES,
    staging_bytes,
)
from rvllm.kernels.spec import Folder, KernelSpec

BLOCK_K = 128  # columns of a packed tile
SCALE_BLOCKS = 2  # of which activations share a scale
# Token tiles. What is resident keeps activations in shared memory as a whole, and can quantise them.
MODES = {
    "split": (16, 32, 64, 128),
    "walk": (16, 32, 64, 128, 192),
    "sum": (64, 128),
    "split_resident": (8,),
    "walk_resident": (8,),
    "tall": (128,),
    "tall_sum": (128,),
    "square": (128,),
    "square_sum": (128,),
    "square_pair": (128,),
}
# Rows of a tile where tokens are the tensor cores' rows.
TALL_ROWS = {"tall": 192, "tall_sum": 192, "square": 128, "square_sum": 128, "square_pair": 128}
MAX_PAIR_SEGMENTS = 4
MAX_STAGES = 12
QUANTISE_THREADS = 128
QUANTISE_GROUPS = QUANTISE_THREADS // 32 * 4  # of columns with one scale that a block of them takes


def cluster_of(mode: str, tokens: int) -> int:
    """Blocks that share each load of x, or of the weights where a kernel is one of gemm_sm90_tall.cu."""
    return 1 if is_split(mode) or tokens < 64 else 2


def is_split(mode: str) -> bool:
    """Whether a block sums one segment of K."""
    return mode.startswith("split")


def is_resident(mode: str) -> bool:
    """Whether a kernel keeps activations in shared memory as a whole."""
    return mode.endswith("_resident")


def threads_of(mode: str, tokens: int) -> int:
    """Threads of a block: two warpgroups and a producer warp, or warpgroup where registers are short."""
    return (
        384
        if mode in TALL_ROWS or (mode == "walk" and tokens >= 160) or (mode == "sum" and tokens >= 128)
        else 288
    )


def smem_of(mode: str, tokens: int, held_blocks: int, most: int = MAX_STAGES) -> int:
    """Dynamic shared memory in bytes; mirrors Layout in gemm/fp8/gemm_sm90.cu. 0: does not fit.

    held_blocks: blocks of K whose activations are resident. most: stages at most.
    """
    if mode in TALL_ROWS:
        return tall_smem(mode)
    resident = is_resident(mode)
    scales = 128 if resident else -(-(64 + 4 * tokens) // 128) * 128
    stage = 2 * TILE_BYTES + (0 if resident else tokens * BLOCK_K) + scales
    staging = 0 if is_split(mode) else staging_bytes(tokens)
    fixed = staging + BARRIERS + (held_blocks * tokens * (BLOCK_K + 4) if resident else 0)
    stages = min(most, (SMEM_LIMIT - fixed) // stage)
    if stages < 2:
        return 0
    if is_split(mode):  # a block's partial sums take the place of its stages
        stages = max(stages, -(-tokens * PARTIAL_PITCH // stage))
    return stages * stage + fixed


def scale_groups(blocks: int) -> int:
    """Scales that a token's activations of so many blocks of K have."""
    return -(-blocks // SCALE_BLOCKS)


def widest_segment(blocks: int, segments: int) -> int:
    """Blocks of K of the longest segment: segments are of whole groups with one scale."""
    return min(blocks, -(-scale_groups(blocks) // segments) * SCALE_BLOCKS)


def tall_smem(mode: str) -> int:
    """Dynamic shared memory in bytes; mirrors TallLayout in gemm/fp8/tall_mainloop.cuh."""
    rows, tokens, warps, barriers = TALL_ROWS[mode], 128, 8, 128
    stage = (rows + tokens) * (BLOCK_K + 4)
    room = warps * rows * (64 if mode in ("tall_sum", "square_pair") else 32)
    return (SMEM_LIMIT - barriers - room) // stage * stage + room + barriers


def sm80_smem(tokens: int) -> int:
    """Dynamic shared memory in bytes; mirrors STAGES in gemm/fp8/gemm_sm80.cu."""
    return 4 * (TILE_BYTES + tokens * BLOCK_K * 2)


_kernel = Folder("gemm/fp8", "rvllm::fp8::").kernel


def _sm90(dtype: str, mode: str, tokens: int) -> KernelSpec:
    name, group = f"sm90_{dtype}_fp8_gemm_{mode}_n{tokens}", mode.removesuffix("_resident")
    together = "few" if tokens <= 16 else "some" if tokens <= 64 else tokens
    resident, cluster = str(is_resident(mode)).lower(), cluster_of(mode, tokens)
    symbol = f"gemm<rvllm::{dtype}, {tokens}, rvllm::fp8::{group.upper()}, {cluster}, {resident}>"
    return _kernel(name, "gemm_sm90", symbol, SMEM_LIMIT, unit=f"{dtype}_{group}_{together}")


def _tall(dtype: str, mode: str) -> KernelSpec:
    kind = mode.partition("_")[2].upper() or "ONE"
    symbol = f"gemm_tall<rvllm::{dtype}, {TALL_ROWS[mode]}, rvllm::fp8::{kind}>"
    name = f"sm90_{dtype}_fp8_gemm_{mode}_n128"
    return _kernel(name, "gemm_sm90_tall", symbol, SMEM_LIMIT, unit=f"{dtype}_{mode}")


def _specs(dtype: str) -> Iterator[KernelSpec]:
    for mode, sizes in MODES.items():
        for tokens in sizes:
            yield _tall(dtype, mode) if mode in TALL_ROWS else _sm90(dtype, mode, tokens)
    yield _kernel(f"sm80_{dtype}_fp8_quantise", "quantise", f"quantise<rvllm::{dtype}>", unit=dtype)
    for tokens in SM80_TOKENS:
        name, symbol = f"sm80_{dtype}_fp8_gemm_n{tokens}", f"gemm_widened<rvllm::{dtype}, {tokens}>"
        yield _kernel(name, "gemm_sm80", symbol, sm80_smem(tokens), unit=dtype)


_LOADING = {"pack": "pack_bytes", "fill": "fill_bytes", "fill_scales": "fill_scales"} | {
    f"quantise_{name}": f"quantise_rows<{kind}>" for name, kind in SOURCES.items()
}
SPECS: list[KernelSpec] = [
    *(spec for dtype in DTYPES for spec in _specs(dtype)),
    *(_kernel(f"sm80_fp8_{name}", "pack", symbol) for name, symbol in _LOADING.items()),
]
