"""Matrix products by kernels built from CUTLASS, for `--gemm-strategy cutlass` and `hybrid`: their launches.

They read the same packed weights as ours. All of K is summed in one chain, whatever the tile, so a product
has the same bits in any batch; ours cut K into segments, so the two differ in their last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from rvllm.backends.cuda.ops.gemm import cost
from rvllm.backends.cuda.ops.gemm.common import ProductPlan, ceil_div
from rvllm.errors import MissingKernelError, UsageError
from rvllm.kernels.gemm.cutlass.specs import TILES, CutlassTile
from rvllm.kernels.gemm.tiles import TILE

CAPABILITY = 90
_EPILOGUE = 12.0  # cycles a token of a tile, on its way out


@dataclass(frozen=True, kw_only=True)
class CutlassPlan(ProductPlan):
    """A launch of a kernel built from CUTLASS."""

    tile: CutlassTile


def plan_cutlass(
    n: int, k: int, tokens: int, dtype: str, sm_count: int, capability: int, why: str = "fits the batch"
) -> CutlassPlan:
    """Chooses the tile for y [tokens, n] = x [tokens, k] W^T.

    n: packed rows that exist, N or `gated_rows`. dtype: `bf16` or `f16`. capability: 90 for 9.0. Raises
    MissingKernelError for other GPUs, UsageError for a k that is no multiple of 8.
    """
    if capability != CAPABILITY:
        raise MissingKernelError(refusal(capability))
    if k % 8 or min(n, k, tokens) < 1:
        raise UsageError(
            f"no matrix kernel for [{tokens}, {k}] x [{n}, {k}]: the inner size must be 8, 16, ..."
        )
    return variant(n, k, tokens, dtype, _best(n, k, tokens, sm_count), sm_count, why)


def refusal(capability: int) -> str:
    """One line for a GPU that these kernels do not run on."""
    return (
        f"kernels built from CUTLASS run on compute capability 9.0, and this GPU has {capability / 10:.1f}; "
        "use --gemm-strategy native or cublas"
    )


def variant(
    n: int, k: int, tokens: int, dtype: str, tile: CutlassTile, sm_count: int, why: str = "asked for"
) -> CutlassPlan:
    """The plan of one given tile."""
    units = _units(n, tokens, tile)
    return CutlassPlan(
        kernel=tile.kernel(dtype),
        tile=tile,
        tokens=tokens,
        rows=n,
        blocks=ceil_div(k, TILE),
        segments=1,
        token_tile=tile.tokens,
        box_rows=tile.box,
        grid=(tile.cluster * min(max(1, sm_count // tile.cluster), units), 1, 1),
        block=tile.threads,
        cluster=tile.cluster,
        smem=tile.smem,
        why=why,
    )


def tile_named(name: str) -> CutlassTile:
    """The tile of a name such as `r64:n128`; KeyError for others."""
    return {f"r{tile.rows}:n{tile.tokens}": tile for tile in TILES}[name]


def ways_of(tokens: int) -> list[CutlassTile]:
    """The tiles worth a thought for so many tokens: up to 64 one tile holds them all."""
    least = min((tile.tokens for tile in TILES if tile.tokens >= tokens), default=TILES[-1].tokens)
    return [tile for tile in TILES if min(64, least) <= tile.tokens <= least]


@cache
def _best(n: int, k: int, tokens: int, sm_count: int) -> CutlassTile:
    blocks = ceil_div(k, TILE)
    return min(ways_of(tokens), key=lambda tile: cycles(tile, n, tokens, blocks, sm_count))


def cycles(tile: CutlassTile, n: int, tokens: int, blocks: int, sm_count: int) -> float:
    """Cycles of a product by the model of `cost`: resident blocks take as many rounds as there are tiles."""
    rounds = ceil_div(_units(n, tokens, tile), sm_count // tile.cluster)
    step = cost.step_cycles(tile.rows // TILE, tile.tokens)
    memory = ceil_div(n, TILE) * blocks * TILE * TILE * 2 / cost.MEMORY
    return max(memory, rounds * (blocks * step + _EPILOGUE * tile.tokens)) + cost.WAY_IN_AND_OUT


def _units(n: int, tokens: int, tile: CutlassTile) -> int:
    """Tiles of a product, those of a cluster counted once."""
    return ceil_div(ceil_div(n, tile.rows), tile.cluster) * ceil_div(tokens, tile.tokens)
