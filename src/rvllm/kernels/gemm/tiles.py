"""What all matrix kernels have in common: tiles, types, and the shared memory of their epilogues.

Mirrors gemm/gemm.cuh and gemm/epilogue.cuh.
"""

from __future__ import annotations

from rvllm.kernels.constants import constants

DTYPES = ("bf16", "f16")
SOURCES = {"f32": "float", "bf16": "rvllm::bf16", "f16": "rvllm::f16"}  # types that matrices are loaded from
SIZES = constants("gemm/gemm.cuh")
TILE, TILE_BYTES = SIZES["TILE"], SIZES["TILE_BYTES"]  # rows of a packed tile; its bytes
SMEM_LIMIT = 232448  # bytes a block of sm_90 may ask for
BARRIERS = 256  # bytes of a kernel's mbarriers
SM80_TOKENS = (16, 64)  # token tiles of the mma.sync kernels
PARTIAL_PITCH = 4 * (2 * TILE + 4)  # bytes from token to token of a block's partial sums


def staging_bytes(tokens: int) -> int:
    """Shared memory through which the sums of a tile of so many tokens leave."""
    chunk = 64 if tokens % 64 == 0 else min(tokens, 32)
    return 2 * max(chunk * (TILE + 8) * 2, min(chunk, 32) * (TILE + 4) * 4)
