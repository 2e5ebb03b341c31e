"""How kernels of latent attention are launched: which one, how many blocks, how much memory.

Pure functions of shapes and of the GPU's limits; `mla/mla.cuh` says how the work is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
from rvllm.errors import MissingKernelError
from rvllm.kernels.mla.specs import (
    DECODE,
    EIGHTS,
    MAX_INNER,
    MAX_RANK,
    MAX_WIDTH,
    PREFILL,
    PREFILL_SM90_BLOCKS,
    PREFILL_SM90_ROWS,
    PREFILL_SM90_SHAPE,
    PREFILL_SM90_SMEM,
    PREFILL_SM90_THREADS,
    STATIC,
    decode_smem,
    product_chunks,
    product_smem,
    splits_of,
    tiles_smem,
)
from rvllm.kernels.types import SHORT
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import HeadLinear

FEW_ROWS = 8  # sequences times groups of 16 heads


@dataclass(frozen=True)
class LatentShape:
    """What launches depend on: query heads, and elements of the latent and of the rotated key."""

    heads: int
    rank: int
    rotated: int

    @property
    def width(self) -> int:
        """Elements of a cached token."""
        return self.rank + self.rotated

    @property
    def parts(self) -> int:
        """Groups of up to 16 heads, the rows of a block."""
        return -(-self.heads // 16)


@dataclass(frozen=True)
class LatentDecodePlan(DecodePlan):
    """A launch of `latent_decode`. spare: the most splits of another block's sequence that a block has."""

    spare: int


def plan_decode(
    dtype: DType,
    shape: LatentShape,
    *,
    max_seqs: int,
    max_model_len: int,
    num_blocks: int,
    sm_count: int,
    smem_per_block: int,
) -> LatentDecodePlan:
    """The launch that decodes up to `max_seqs` sequences of up to `max_model_len` tokens.

    num_blocks: size of the KV pool, which bounds how long one sequence can be. Raises MissingKernelError.
    """
    check(shape)
    # Few sequences have a tile a block: one buffer serves, and leaves room beside it for the next kernel.
    kernels = list(DECODE.items())[:: -1 if max_seqs * shape.parts <= FEW_ROWS else 1]
    fitting = (
        (suffix, buffers)
        for suffix, (buffers, most) in kernels
        if max_seqs <= most and decode_smem(MAX_WIDTH, buffers, most) + STATIC <= smem_per_block
    )
    suffix, buffers = next(fitting, ("", 0))
    if not buffers:
        raise MissingKernelError(
            f"no latent attention kernel for {max_seqs} sequences and {smem_per_block // 1024} KB of shared "
            "memory; lower --max-num-seqs"
        )
    splits = splits_of(min(max_model_len, num_blocks * KV_BLOCK))
    items = max_seqs * splits * shape.parts
    grid = min(items, sm_count)
    spare = min(splits, -(-items // grid))
    if items * grid >= 1 << 32:
        raise MissingKernelError(
            f"latent attention cannot list {max_seqs} sequences of {max_model_len} tokens; lower "
            "--max-num-seqs or --max-model-len"
        )
    return LatentDecodePlan(
        kernel=f"sm80_{SHORT[dtype.value]}_latent_decode{suffix}",
        grid=grid,
        block=256,
        smem=decode_smem(shape.width, buffers, max_seqs),
        partial_bytes=4 * grid * (spare + 1) * 16 * (shape.rank + 2),
        arrivals_bytes=16 * max_seqs * shape.parts,
        spare=spare,
    )


def plan_prefill(dtype: DType, shape: LatentShape, smem_per_block: int) -> PrefillPlan:
    """The launch that computes prompts; raises MissingKernelError as `plan_decode` does."""
    check(shape)
    for suffix, (warps, groups, buffers) in PREFILL.items():
        if tiles_smem(MAX_WIDTH, 16 * groups, buffers) + STATIC <= smem_per_block:
            smem = tiles_smem(shape.width, 16 * groups, buffers)
            name = f"sm80_{SHORT[dtype.value]}_latent_prefill{suffix}"
            return PrefillPlan(name, 16 * groups, 32 * warps * groups, smem)
    raise MissingKernelError(f"no latent attention kernel for {smem_per_block // 1024} KB of shared memory")


def plan_prefill_sm90(dtype: DType, shape: LatentShape, chip: DeviceInfo) -> PrefillPlan | None:
    """The launch that computes prompts by wgmma, with the same bits; None where there is no such kernel."""
    if chip.capability != 90 or (shape.rank, shape.rotated) != PREFILL_SM90_SHAPE:
        return None
    return PrefillPlan(
        f"sm90_{SHORT[dtype.value]}_latent_prefill",
        PREFILL_SM90_ROWS,
        PREFILL_SM90_THREADS,
        PREFILL_SM90_SMEM,
        min(chip.sm_count, PREFILL_SM90_BLOCKS),
    )


def check(shape: LatentShape) -> None:
    """Raises MissingKernelError for a shape without kernels."""
    fits = shape.rank % 16 == 0 and shape.rotated % 16 == 0
    if not fits or shape.rank > MAX_RANK or shape.width > MAX_WIDTH:
        raise MissingKernelError(
            f"no latent attention kernel for a latent of {shape.rank} elements and a key of {shape.rotated}: "
            f"multiples of 16, the latent at most {MAX_RANK} and both together at most {MAX_WIDTH}"
        )


@dataclass(frozen=True)
class Product:
    """How the product of each head is launched: see `mla/head_gemm.cu`."""

    suffix: str
    heads: int
    rows: int
    inner: int
    tail: int
    eights: int
    smem: int

    def grid(self, tokens: int, more: int = 0) -> tuple[int, int, int]:
        """Blocks for that many tokens; more: blocks beside those of the product."""
        chunks = product_chunks(self.rows, self.inner)
        return self.heads * chunks + more, -(-tokens // (8 * self.eights)), 1


def plan_product(op: HeadLinear, tokens: int) -> Product:
    """The product for up to `tokens` tokens; raises MissingKernelError for odd sizes."""
    heads, rows, inner = op.weight.shape
    if inner % 8 or op.tail % 8 or rows % (8 if op.tail else 2) or inner > MAX_INNER:
        raise MissingKernelError(
            f"no kernel for heads' matrices [{rows}, {inner}] with {op.tail} more elements; sizes must be "
            f"multiples of 8, and the inner one at most {MAX_INNER}"
        )
    eights = next((n for n in EIGHTS if 8 * n >= tokens), EIGHTS[-1])
    return Product(f"n{8 * eights}", heads, rows, inner, op.tail, eights, product_smem(inner, eights))
