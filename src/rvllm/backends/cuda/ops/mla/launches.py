"""MLA: latents in the cache and the products that absorb its projections: their launches.

A layer is two stages (see `fuse`): the norm of the latent, the rotation and the absorbed queries are one
launch; attention and the product with W_uv are one for decodes, one for prompts and one for the product,
which also puts together what several blocks decoded.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import Count, ints
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_DECODES, NUM_TOKENS
from rvllm.backends.cuda.layout.packed import ELEMENT, WeightLayout
from rvllm.backends.cuda.ops.attention.launches import attend
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan
from rvllm.backends.cuda.ops.family import Emitter, Family, Lowering, PagedPlans, Scratch, Wanted
from rvllm.backends.cuda.ops.mla.plan import (
    LatentDecodePlan,
    LatentShape,
    check,
    plan_decode,
    plan_prefill,
    plan_prefill_sm90,
    plan_product,
)
from rvllm.errors import MissingKernelError
from rvllm.kernels.mla.specs import PREFILL_SM90_ROWS, PREFILL_SM90_SHAPE, prefill_sm90_totals
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import HeadLinear, LatentAttention, LatentRopeKV, Norm, Op, Program

THREADS = 128  # of the products' blocks
TOTALS = "mla.totals"  # scratch: what latent_prefill_sm90 keeps of splits that are done


def _shape(op: Op) -> LatentShape:
    assert isinstance(op, LatentAttention)
    return LatentShape(op.heads, op.rank, op.cache.key_dim - op.rank)


def _decode(
    op: Op, dtype: DType, chip: DeviceInfo, seqs: int, longest: int, blocks: int, rotates: bool
) -> DecodePlan:
    return plan_decode(
        dtype,
        _shape(op),
        max_seqs=seqs,
        max_model_len=longest,
        num_blocks=blocks,
        sm_count=chip.sm_count,
        smem_per_block=chip.smem_per_block,
    )


def _prefill(op: Op, dtype: DType, chip: DeviceInfo) -> PrefillPlan:
    shape = _shape(op)
    return plan_prefill_sm90(dtype, shape, chip) or plan_prefill(dtype, shape, chip.smem_per_block)


def _group(op: Op) -> int:
    return _shape(op).heads


def _head_linear(lowering: Lowering, stage: Stage) -> None:
    """A product on its own."""
    (op,) = stage.ops
    assert isinstance(op, HeadLinear)
    _multiply(lowering, stage.name, op)


def _multiply(to: Lowering, name: str, op: HeadLinear, merged: tuple[object, ...] = (), *last: int) -> None:
    """merged: of what several blocks decoded, which it puts together; last: what the kernel is told then."""
    product, kind = plan_product(op, to.counts.tokens), "latent_values" if merged else "head_linear"
    to.plan(
        name,
        f"sm80_{to.tag}_{kind}_{product.suffix}",
        lambda c: product.grid(c.tokens),
        THREADS,
        to.at.buffers[op.out.name],
        to.at.buffers[op.x.name],
        to.weight(op.weight, "table"),
        *merged,
        Count("tokens"),
        *map(ctypes.c_int, (product.heads, product.rows, product.inner, *(last or (product.tail,)))),
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
    check(LatentShape(rope.heads, rank, rope.rope.dim))
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
        *ints(rope.q.width, rope.kv.width),
        *ints(product.heads, rank, product.inner, rope.rope.dim, lowering.shape.table_stride),
        ctypes.c_float(norm.eps),
        smem=product.smem,
    )


def _attention(lowering: Lowering, stage: Stage) -> None:
    """Attention over latents, what puts its parts together, and the product that makes values of them."""
    if len(stage.ops) != 2:
        raise MissingKernelError("no kernel for latent attention without the product that follows it")
    op, after = stage.ops
    assert isinstance(op, LatentAttention) and isinstance(after, HeadLinear)
    cache, _ = lowering.at.caches[op.cache.name]
    shape, decode = _shape(op), _decode_plan(lowering.decode, op)
    numbers = (
        *ints(shape.width, shape.rank, shape.heads, lowering.shape.table_stride),
        ctypes.c_float(op.scale),
    )
    places = (lowering.at.buffers[op.out.name], lowering.at.buffers[op.q.name], cache)
    counts = [ctypes.c_int(n) for n in (lowering.layout.seqs, decode.spare)]
    attend(lowering, stage.name, op, places, numbers, one=counts, persistent=_boxed(lowering, op))
    parts = (lowering.at.partial, lowering.at.arrivals, lowering.meta(NUM_DECODES))
    if lowering.counts.tokens == 1:  # a launch saved is more than what its blocks do twice
        _multiply(lowering, stage.name, after, parts, decode.grid, decode.spare)
        return
    lowering.plan(
        stage.name,
        f"sm80_{lowering.tag}_latent_merge",
        lambda c: (shape.heads, min(c.tokens, c.seqs), 1),
        THREADS,
        lowering.at.buffers[op.out.name],
        *parts,
        *ints(shape.heads, shape.rank, decode.grid, decode.spare),
    )
    _multiply(lowering, stage.name, after)


def _boxed(to: Lowering, op: LatentAttention) -> tuple[Sequence[object], Sequence[object]]:
    """What latent_prefill_sm90 is told, before and behind the step's sequences and tiles."""
    shape, (cache, _) = _shape(op), to.at.caches[op.cache.name]
    queries = to.capacity(op.q.rows) * shape.heads
    front = (
        to.at.buffers[op.out.name],
        to.boxes(to.at.buffers[op.q.name], queries, shape.width, PREFILL_SM90_ROWS),
        to.boxes(cache, to.shape.kv_blocks * KV_BLOCK, shape.width, KV_BLOCK),
    )
    numbers = map(ctypes.c_int, (shape.heads, to.shape.table_stride))
    return front, (to.at.scratch.get(TOTALS, 0), *numbers, ctypes.c_float(op.scale))


def _scratch(program: Program, tokens: int, seqs: int, capability: int) -> Scratch:
    ops = [op for op in program.ops if isinstance(op, LatentAttention)]
    hopper = capability == 90 and any(
        (op.rank, op.cache.key_dim - op.rank) == PREFILL_SM90_SHAPE for op in ops
    )
    return {TOTALS: prefill_sm90_totals()} if hopper else {}


def _decode_plan(plans: Mapping[str, DecodePlan], op: LatentAttention) -> LatentDecodePlan:
    plan = plans[op.name]
    assert isinstance(plan, LatentDecodePlan)
    return plan


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    return ((op.weight, "table"),) if isinstance(op, HeadLinear) else ()


EMITTERS: dict[type[Op], Emitter] = {
    LatentRopeKV: _prepare,
    LatentAttention: _attention,
    HeadLinear: _head_linear,
}
FAMILY = Family(
    emitters=EMITTERS,
    leading=tuple(EMITTERS),
    weights=_weights,
    scratch=_scratch,
    paged={LatentAttention: PagedPlans(_decode, _prefill, _group)},
)
