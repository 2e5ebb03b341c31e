"""The matrix kernels of the catalog: names, instantiations and the constants that their plans need.

`sm90_bf16_gemm_walk_n16` is the wgmma kernel that walks over tiles with 16 tokens at a time. The modes are
described in gemm/gemm_sm90.cu and gemm/gemm_sm80.cu; `backends/cuda/ops/gemm/plan.py` chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rvllm.kernels.constants import constants
from rvllm.kernels.gemm.tiles import (
    BARRIERS,
    DTYPES,
    PARTIAL_PITCH,
    SMEM_LIMIT,
    SOURCES,
    TILE,
    TILE_BYTES,
    staging_bytes,
)
from rvllm.kernels.spec import Folder, KernelSpec

SPLIT_TOKENS = (8, 16, 32, 64, 96, 128, 256)  # token tiles that the sm_90a kernels are compiled for
WALK_TOKENS = (8, 16, 32, 64, 96, 128, 192)
FLOW_TOKENS = (256,)
SUM_TOKENS = (96, 128, 160, 192)
TALL_TOKENS = (64, 192)
WIDE_TOKENS = (256,)
PAIR_TOKENS = (192,)
EIGHT_TOKENS = (64, 96, 128)
HALF, SMEM_HALF = 0, SMEM_LIMIT // 2 - 512  # bytes, where two blocks share a multiprocessor
MODES = {
    "split": SPLIT_TOKENS,
    "eight": EIGHT_TOKENS,
    "pair": PAIR_TOKENS,
    "walk": WALK_TOKENS,
    "flow": FLOW_TOKENS,
    "sum": SUM_TOKENS,
}  # of gemm_sm90.cu
SPLIT_WIDE = (144, 160, 176, 192, 208, 224, 240, 256)  # token tiles of the largest split kernel
PAIR_TILES = (128, 144, 160, 176, 192)  # token tiles of the pair kernel
# Token tiles of the tall kernel.
TALL_TILES = (32, 48, 64, 72, 80, 96, 104, 112, 120, 128, 136, 144, 160, 176, 192)
WIDE_SMEM = 3 * (2 * TILE_BYTES + 256 * TILE * 2) + 2 * 80 * 128 * 4 + BARRIERS  # bytes; mirrors Wide


def walk_cluster(tokens: int) -> int:
    """Blocks that share each load of x in the walk, flow and sum modes."""
    return 1 if tokens < 64 else 2


def walk_box(mode: str, tokens: int) -> int:
    """Tokens of one load of x in the walk, flow and sum modes; mirrors gemm/gemm_sm90.cu."""
    return 64 if mode in ("flow", "wide") else tokens // walk_cluster(tokens)


def sm90_threads(mode: str, tokens: int) -> int:
    """Threads of a block: two warpgroups and a producer warp, or warpgroup where registers are short."""
    if mode == "tall":
        return 512
    return 384 if mode != "split" and tokens >= 160 else 288


def sm90_smem(mode: str, tokens: int, most: int = 12) -> int:
    """Dynamic shared memory in bytes, at most `most` stages of a split; mirrors Layout in gemm_sm90.cu.

    most HALF: as many as leave room for another block.
    """
    if mode == "tall":
        return _tall_smem(tokens)
    if mode == "wide":
        return WIDE_SMEM
    stage = 2 * TILE_BYTES + tokens * TILE * 2
    staging = 0 if mode in ("split", "eight", "pair") else staging_bytes(tokens)
    if mode == "flow":
        staging = 2 * 128 * TILE * 2
    stages = min(12, (SMEM_LIMIT - staging - BARRIERS) // stage)
    if mode == "eight" or (mode == "split" and most == HALF):
        return (SMEM_HALF - BARRIERS) // stage * stage + BARRIERS
    if mode == "split":  # a block's partial sums take the place of its stages
        stages = min(stages, max(most, 2, -(-tokens * PARTIAL_PITCH // stage)))
    return stages * stage + staging + BARRIERS


def widths_of(mode: str, tokens: int) -> tuple[int, ...]:
    """The token tiles that the kernel `mode` compiled for `tokens` can be launched with."""
    if mode == "tall":
        return tuple(tile for tile in TALL_TILES if (tile <= TALL_TOKENS[0]) == (tokens == TALL_TOKENS[0]))
    if mode == "pair":
        return PAIR_TILES
    return SPLIT_WIDE if mode == "split" and tokens == SPLIT_WIDE[-1] else (tokens,)


def _tall_smem(tokens: int) -> int:
    """As sm90_smem, of a tall kernel with token tiles of this size; mirrors Tall in gemm_sm90_tall.cu."""
    stage, staging = 3 * TILE_BYTES + tokens * TILE * 2, 3 * TILE_BYTES
    return min(8, (SMEM_LIMIT - staging - BARRIERS) // stage) * stage + staging + BARRIERS


@dataclass(frozen=True)
class MmaTile:
    """What a block of gemm_sm80.cu sums: `rows` of W by `tokens`, by `row_warps` by `token_warps` warps.

    blocks: that are to share a multiprocessor where its memory allows it; registers are kept for so many.
    """

    rows: int
    tokens: int
    row_warps: int
    token_warps: int
    blocks: int

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.token_warps

    @property
    def stage(self) -> int:
        """Bytes of shared memory for 64 of K."""
        return (self.rows + self.tokens) * TILE * 2

    @property
    def keeps(self) -> bool:
        """Whether a block can sum several segments; mirrors KEEPS."""
        return self.rows * self.tokens <= 64 * self.threads


MMA_TILES = {
    "sm80": (
        MmaTile(64, 8, 4, 1, 4),
        MmaTile(64, 16, 4, 1, 4),
        MmaTile(64, 32, 4, 1, 4),
        MmaTile(64, 64, 2, 2, 3),
        MmaTile(64, 128, 2, 2, 2),
    ),
    "sm80_wide": (MmaTile(128, 128, 2, 4, 1), MmaTile(128, 256, 2, 4, 1)),
}
MAX_RING = 6  # stages of a ring; mirrors wait_for_all_but
MAX_SPLIT_TILES = constants("gemm/gemm_sm80.cu")["MAX_SPLIT_TILES"]


def _specs(dtype: str) -> Iterator[KernelSpec]:
    kernel, t = Folder("gemm", "rvllm::gemm::").kernel, f"rvllm::{dtype}"
    for mode, sizes in MODES.items():
        for tokens in sizes:
            cluster = 1 if mode in ("split", "eight", "pair") else walk_cluster(tokens)
            # The longest unit decides how long a first start takes.
            together = "few" if tokens <= 16 else "some" if tokens <= 64 else tokens
            symbol = f"gemm<{t}, {tokens}, rvllm::gemm::{mode.upper()}, {cluster}>"
            smem = max(sm90_smem(mode, tile) for tile in widths_of(mode, tokens))
            name, unit = f"sm90_{dtype}_gemm_{mode}_n{tokens}", f"{dtype}_{mode}_{together}"
            yield kernel(name, "gemm_sm90", symbol, smem, unit=unit)
    for tokens in WIDE_TOKENS:
        name = f"sm90_{dtype}_gemm_wide_n{tokens}"
        yield kernel(name, "gemm_sm90_wide", f"gemm_wide<{t}>", WIDE_SMEM, unit=dtype)
    for tokens in TALL_TOKENS:
        smem = max(_tall_smem(tile) for tile in widths_of("tall", tokens))
        name, symbol = f"sm90_{dtype}_gemm_tall_n{tokens}", f"gemm_tall<{t}, {tokens}>"
        yield kernel(name, "gemm_sm90_tall", symbol, smem, unit=f"{dtype}_{tokens}")
    for tile in (tile for tiles in MMA_TILES.values() for tile in tiles):
        name = f"sm80_{dtype}_gemm_r{tile.rows}_n{tile.tokens}"
        shape = tile.rows, tile.tokens, tile.row_warps, tile.token_warps, tile.blocks
        symbol = f"gemm<{t}, {', '.join(map(str, shape))}>"
        smem = min(MAX_RING, SMEM_LIMIT // tile.stage) * tile.stage
        unit = f"{dtype}_{'few' if tile.tokens <= 64 else 'many'}"
        yield kernel(name, "gemm_sm80", symbol, smem, static_smem=0, unit=unit)
    for source, stored in SOURCES.items():
        yield kernel(f"sm80_{dtype}_gemm_pack_{source}", "pack", f"pack<{stored}, {t}>")


SPECS: list[KernelSpec] = [
    *(spec for dtype in DTYPES for spec in _specs(dtype)),
    KernelSpec("sm80_stream_read", "common/stream_read.cu", "rvllm::stream_read"),
]
