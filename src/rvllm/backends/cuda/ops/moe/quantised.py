"""Experts whose weights keep their format: which kernel multiplies a stack, and what it has to be told.

The kernels are in `kernels/moe/`: `quantised_gemm.cu`, mma.sync on every GPU, for many entries on Hopper
`quantised_wide_sm90.cu`, and for a few tokens `quantised_one.cu`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.backends.cuda.formats import fp8_plan
from rvllm.backends.cuda.ops.gemm import integer
from rvllm.kernels.gemm.integer.specs import CHUNK
from rvllm.kernels.moe.specs import (
    QUANTISED_DOWN_STAGES,
    QUANTISED_ONE_WARPS,
    QUANTISED_UP_STAGES,
    QUANTISED_WIDE,
    quantised_one_smem,
    quantised_runs,
    quantised_smem,
    quantised_wide_smem,
)
from rvllm.program.formats import Fp8Format, IntegerFormat, WeightFormat

SCALES = {"row": 1, "block": 2}  # Scales in quantised_gemm.cu
LONG = 4  # sums of a warp from which on a block has more warps


@dataclass(frozen=True)
class OneToken:
    """A block of `quantised_one_up` or `quantised_one_down`: its warps, of each the ring, and its memory."""

    stages: int
    warps: int
    slots: int
    smem: int


@dataclass(frozen=True)
class StackProduct:
    """The product with one matrix of a stack: [rows, k] as packed, the same sums for every tile size.

    layout: the kernels' name for the weights' format. stride: bytes from matrix to matrix. scales: as the
    kernel knows them.
    """

    layout: str
    stride: int
    scales: int
    chunks: int
    segments: int

    def kernel(self, tag: str, tile: int) -> str:
        """The kernel for tiles of so many entries."""
        if tile == QUANTISED_WIDE:
            return f"sm90_{tag}_moe_{self.layout}_n{tile}"
        return f"sm80_{tag}_experts_{self.layout}_n{tile}"

    def smem(self, tile: int) -> int:
        """Its dynamic shared memory in bytes."""
        return (
            quantised_wide_smem(self.layout) if tile == QUANTISED_WIDE else quantised_smem(self.layout, tile)
        )

    def one_token(self, experts: int, room: int) -> OneToken | None:
        """How a block of the kernels for a few tokens sums so many experts' rows; None without room.

        experts: 1 for up matrices, all of a token's for down matrices. room: shared memory of a block, bytes.
        """
        runs = quantised_runs(self.layout)
        units = self.chunks if runs else self.segments  # of an expert's matrix, what one warp sums
        sums = experts * units * max(1, runs)
        for stages in QUANTISED_DOWN_STAGES if experts > 1 else (QUANTISED_UP_STAGES,):
            few, many = QUANTISED_ONE_WARPS
            warps = few if experts * units <= few * LONG else many
            each = -(-experts * units // warps) * (1 if runs else -(-self.chunks // self.segments))
            slots = min(stages, each)
            smem = quantised_one_smem(self.layout, warps, slots, sums)
            if smem <= room:
                return OneToken(stages, warps, slots, smem)
        return None


def stack_product(kept: WeightFormat, rows: int, k: int) -> StackProduct:
    """How a stack of [rows, k] matrices in a format is multiplied; rows: packed rows of one."""
    if isinstance(kept, Fp8Format):
        stride, segments = fp8_plan.packed_nbytes(rows, k, kept.scales), fp8_plan.segments_of(rows, k)
        return StackProduct("e4m3", stride, SCALES[kept.scales], -(-k // CHUNK), segments)
    assert isinstance(kept, IntegerFormat)
    width, ((_, name),) = kept.packed_width(k), kept.parts
    stride = integer.stack_stride(kept, rows, k)
    return StackProduct(name, stride, 0, -(-width // CHUNK), integer.segments_of(rows, width))


def reordered_width(kept: WeightFormat | None, k: int) -> int:
    """Columns of the rows that a stack is multiplied with, where each matrix has them in an order of its own;
    0 where they are the activations'.
    """
    return kept.packed_width(k) if isinstance(kept, IntegerFormat) and kept.reordered else 0
