"""MLA: latents in the cache and the products that absorb its projections: their launches.

A layer is two stages (see `fuse`): the norm of the latent, the rotation and the absorbed queries are one
launch; attention and the product with W_uv are one for decodes, one for prompts and one for the product,
which also puts together what several blocks decoded.

EMITTERS: what plans the launches of a stage with an op of this type. PAGED: how attention is planned.
`scratch` sizes the device memory that these launches need beside the program's buffers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rvllm.backends.cuda.attention import BLOCK, DecodePlan, PrefillPlan
from rvllm.backends.cuda.chip import Chip
from rvllm.backends.cuda.families import Emitter, PagedPlans, Scratch
from rvllm.backends.cuda.launches import Count, fixed
from rvllm.backends.cuda.metadata import NUM_DECODES, NUM_TOKENS
from rvllm.backends.cuda.placement import ELEMENT
from rvllm.errors import MissingKernelError
from rvllm.kernels.latent_manifest import (
    DECODE,
    EIGHTS,
    MOST_INNER,
    MOST_RANK,
    MOST_WIDTH,
    PREFILL,
    STATIC,
    decode_smem,
    product_chunks,
    product_smem,
    splits_of,
    tiles_smem,
)
from rvllm.program.dtypes import DType
from rvllm.program.ops import HeadLinear, LatentAttention, LatentRopeKV, Norm, Op, Program

if TYPE_CHECKING:
    from rvllm.backends.cuda.fuse import Stage
    from rvllm.backends.cuda.lowering import Lowering

THREADS = 128  # of the products' blocks


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
    _check(shape)
    fitting = (
        (suffix, buffers)
        for suffix, (buffers, most) in DECODE.items()
        if max_seqs <= most and decode_smem(MOST_WIDTH, buffers, most) + STATIC <= smem_per_block
    )
    suffix, buffers = next(fitting, ("", 0))
    if not buffers:
        raise MissingKernelError(
            f"no latent attention kernel for {max_seqs} sequences and {smem_per_block // 1024} KB of shared "
            "memory; lower --max-num-seqs"
        )
    splits = splits_of(min(max_model_len, num_blocks * BLOCK))
    items = max_seqs * splits * shape.parts
    grid = min(items, sm_count)
    spare = min(splits, -(-items // grid))
    if items * grid >= 1 << 32:
        raise MissingKernelError(
            f"latent attention cannot list {max_seqs} sequences of {max_model_len} tokens; lower "
            "--max-num-seqs or --max-model-len"
        )
    return LatentDecodePlan(
        kernel=f"sm80_{_tag(dtype)}_latent_decode{suffix}",
        grid=grid,
        block=256,
        smem=decode_smem(shape.width, buffers, max_seqs),
        partial_bytes=4 * grid * (spare + 1) * 16 * (shape.rank + 2),
        arrivals_bytes=16 * max_seqs * shape.parts,
        spare=spare,
    )


def plan_prefill(dtype: DType, shape: LatentShape, smem_per_block: int) -> PrefillPlan:
    """The launch that computes prompts; raises MissingKernelError as `plan_decode` does."""
    _check(shape)
    for suffix, (warps, groups, buffers) in PREFILL.items():
        if tiles_smem(MOST_WIDTH, 16 * groups, buffers) + STATIC <= smem_per_block:
            smem = tiles_smem(shape.width, 16 * groups, buffers)
            name = f"sm80_{_tag(dtype)}_latent_prefill{suffix}"
            return PrefillPlan(name, 16 * groups, 32 * warps * groups, smem)
    raise MissingKernelError(f"no latent attention kernel for {smem_per_block // 1024} KB of shared memory")


def _check(shape: LatentShape) -> None:
    fits = shape.rank % 16 == 0 and shape.rotated % 16 == 0
    if not fits or shape.rank > MOST_RANK or shape.width > MOST_WIDTH:
        raise MissingKernelError(
            f"no latent attention kernel for a latent of {shape.rank} elements and a key of {shape.rotated}: "
            f"multiples of 16, the latent at most {MOST_RANK} and both together at most {MOST_WIDTH}"
        )


def _tag(dtype: DType) -> str:
    return "bf16" if dtype is DType.BF16 else "f16"


def _shape(op: Op) -> LatentShape:
    assert isinstance(op, LatentAttention)
    return LatentShape(op.heads, op.rank, op.cache.key_dim - op.rank)


def _decode(op: Op, dtype: DType, chip: Chip, seqs: int, longest: int, blocks: int) -> DecodePlan:
    return plan_decode(
        dtype,
        _shape(op),
        max_seqs=seqs,
        max_model_len=longest,
        num_blocks=blocks,
        sm_count=chip.sm_count,
        smem_per_block=chip.smem_per_block,
    )


def _prefill(op: Op, dtype: DType, chip: Chip) -> PrefillPlan:
    return plan_prefill(dtype, _shape(op), chip.smem_per_block)


def _group(op: Op) -> int:
    return _shape(op).heads


@dataclass(frozen=True)
class Product:
    """How the product of each head is launched: see `head_linear.cu`."""

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
    if inner % 8 or op.tail % 8 or rows % (8 if op.tail else 2) or inner > MOST_INNER:
        raise MissingKernelError(
            f"no kernel for heads' matrices [{rows}, {inner}] with {op.tail} more elements; sizes must be "
            f"multiples of 8, and the inner one at most {MOST_INNER}"
        )
    eights = next((n for n in EIGHTS if 8 * n >= tokens), EIGHTS[-1])
    return Product(f"n{8 * eights}", heads, rows, inner, op.tail, eights, product_smem(inner, eights))


def _head_linear(lowering: Lowering, stage: Stage) -> None:
    """A product on its own."""
    (op,) = stage.ops
    assert isinstance(op, HeadLinear)
    product = plan_product(op, lowering.counts.tokens)
    lowering.plan(
        stage.name,
        f"sm80_{lowering.tag}_head_linear_{product.suffix}",
        lambda c: product.grid(c.tokens),
        THREADS,
        lowering.at.buffers[op.out.name],
        lowering.at.buffers[op.x.name],
        lowering.weight(op.weight, "table"),
        Count("tokens"),
        *map(ctypes.c_int, (product.heads, product.rows, product.inner, product.tail)),
        smem=product.smem,
    )


def _prepare(lowering: Lowering, stage: Stage) -> None:
    """Norm of the latent, rotation, cache and absorbed queries."""
    if len(stage.ops) != 3:
        raise MissingKernelError("no kernel that writes latents to the cache without normalising them")
    norm, rope, absorb = stage.ops
    assert isinstance(norm, Norm) and isinstance(rope, LatentRopeKV) and isinstance(absorb, HeadLinear)
    product = plan_product(absorb, lowering.counts.tokens)
    rank = rope.cache.key_dim - rope.rope.dim
    _check(LatentShape(rope.heads, rank, rope.rope.dim))
    cos, sin = lowering.at.ropes[rope.rope]
    cache, _ = lowering.at.caches[rope.cache.name]
    interleaved = "_interleaved" if rope.rope.interleaved else ""
    lowering.plan(
        stage.name,
        f"sm80_{lowering.tag}_latent_prepare{interleaved}_{product.suffix}",
        lambda c: product.grid(c.tokens, product.eights),
        THREADS,
        lowering.at.buffers[absorb.out.name],
        lowering.at.buffers[rope.q.name],
        lowering.at.buffers[rope.kv.name] + ELEMENT * norm.start,
        lowering.weight(absorb.weight, "table"),
        cache,
        lowering.weight(norm.weight, "norm"),
        cos,
        sin,
        lowering.at.tables,
        lowering.meta(lowering.layout.positions),
        lowering.meta(lowering.layout.token_slots),
        lowering.meta(NUM_TOKENS),
        Count("tokens"),
        *map(ctypes.c_int, (rope.q.width, rope.kv.width)),
        *map(ctypes.c_int, (product.heads, rank, product.inner, rope.rope.dim, lowering.shape.table_stride)),
        ctypes.c_float(norm.eps),
        smem=product.smem,
    )


def _attention(lowering: Lowering, stage: Stage) -> None:
    """Attention over latents, and the product that makes values of what it mixes."""
    if len(stage.ops) != 2:
        raise MissingKernelError("no kernel for latent attention without the product that follows it")
    op, after = stage.ops
    assert isinstance(op, LatentAttention) and isinstance(after, HeadLinear)
    cache, _ = lowering.at.caches[op.cache.name]
    shape = _shape(op)
    shared = (
        lowering.at.buffers[op.out.name],
        lowering.at.buffers[op.q.name],
        cache,
        lowering.at.tables,
        lowering.meta(lowering.layout.seq_slots),
        lowering.meta(lowering.layout.kv_lens),
    )
    numbers = (
        *map(ctypes.c_int, (shape.width, shape.rank, shape.heads, lowering.shape.table_stride)),
        ctypes.c_float(op.scale),
    )
    decode = _decode_plan(lowering.decode, op)
    lowering.plan(
        stage.name,
        decode.kernel,
        fixed(decode.grid),
        decode.block,
        *shared,
        lowering.meta(NUM_DECODES),
        lowering.at.partial,
        lowering.at.arrivals,
        *numbers,
        ctypes.c_int(lowering.layout.seqs),
        ctypes.c_int(decode.spare),
        smem=decode.smem,
        why="sequences with one token",
    )
    if lowering.prefill is not None:
        prefill = lowering.prefill[op.name]
        lowering.plan(
            stage.name,
            prefill.kernel,
            fixed(lowering.layout.tiles),
            prefill.block,
            *shared,
            lowering.meta(lowering.layout.query_offsets),
            lowering.meta(lowering.layout.tile_list),
            *numbers,
            smem=prefill.smem,
            why="sequences with several tokens",
        )
    product = plan_product(after, lowering.counts.tokens)
    lowering.plan(
        stage.name,
        f"sm80_{lowering.tag}_latent_values_{product.suffix}",
        lambda c: product.grid(c.tokens),
        THREADS,
        lowering.at.buffers[after.out.name],
        lowering.at.buffers[op.out.name],
        lowering.weight(after.weight, "table"),
        lowering.at.partial,
        lowering.at.arrivals,
        lowering.meta(NUM_DECODES),
        Count("tokens"),
        *map(ctypes.c_int, (product.heads, product.rows, product.inner, decode.grid, decode.spare)),
        smem=product.smem,
    )


def _decode_plan(plans: Mapping[str, DecodePlan], op: LatentAttention) -> LatentDecodePlan:
    plan = plans[op.name]
    assert isinstance(plan, LatentDecodePlan)
    return plan


EMITTERS: dict[type[Op], Emitter] = {
    LatentRopeKV: _prepare,
    LatentAttention: _attention,
    HeadLinear: _head_linear,
}
PAGED: dict[type[Op], PagedPlans] = {LatentAttention: PagedPlans(_decode, _prefill, _group)}


def scratch(program: Program, tokens: int, seqs: int) -> Scratch:
    """None: parts of results lie in the memory that all attention shares."""
    return {}
