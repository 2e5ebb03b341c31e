"""Matrix kernels built from CUTLASS: names, instantiations and the constants that their plans need.

`sm90_bf16_cutlass_r64_n16`: tiles of 64 rows of W by 16 tokens. See gemm/cutlass/gemm_sm90.cu.
"""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.kernels.gemm.tiles import DTYPES, SMEM_LIMIT, TILE, TILE_BYTES, staging_bytes
from rvllm.kernels.spec import KernelSpec

MAX_STAGES = 12
ALIGNMENT = 1024  # of tiles in shared memory


@dataclass(frozen=True)
class CutlassTile:
    """Rows of W and tokens that a block sums at once. cluster: blocks that share each load of x."""

    rows: int
    tokens: int
    cluster: int

    @property
    def threads(self) -> int:
        """A warpgroup for each 64 rows, and the producer's."""
        return 128 * (self.rows // TILE + 1)

    @property
    def box(self) -> int:
        """Tokens of one load of x."""
        return self.tokens // self.cluster

    @property
    def smem(self) -> int:
        """Dynamic shared memory in bytes; mirrors CutlassTraits::Shared in gemm/cutlass/gemm_sm90.cu."""
        groups = self.rows // TILE
        stage = groups * TILE_BYTES + self.tokens * TILE * 2
        staging = groups * staging_bytes(self.tokens) // 2
        stages = min(MAX_STAGES, (SMEM_LIMIT - ALIGNMENT - staging) // stage)
        return -(-(stages * (stage + 16) + staging) // ALIGNMENT) * ALIGNMENT

    def kernel(self, dtype: str) -> str:
        return f"sm90_{dtype}_cutlass_r{self.rows}_n{self.tokens}"


TILES = (
    *(CutlassTile(TILE, tokens, 1) for tokens in (8, 16, 32, 64, 128)),
    CutlassTile(2 * TILE, 64, 1),
    *(CutlassTile(2 * TILE, tokens, 2) for tokens in (128, 192, 256)),
)


SPECS: list[KernelSpec] = [
    KernelSpec(
        tile.kernel(dtype),
        "gemm/cutlass/gemm_sm90.cu",
        f"rvllm::gemm::gemm_cutlass<rvllm::{dtype}, {tile.rows // TILE}, {tile.tokens}, {tile.cluster}>",
        tile.smem,
        unit=tile.kernel(dtype),
        extra="cutlass",
    )
    for dtype in DTYPES
    for tile in TILES
]
