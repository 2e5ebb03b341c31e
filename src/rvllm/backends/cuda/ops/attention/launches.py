"""Attention over the paged cache, dense or block-sparse, and the rotation that fills it: their launches.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.device.launches import MatrixMap, fixed, ints
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_DECODES, NUM_TILES, NUM_TOKENS
from rvllm.backends.cuda.ops.attention.plan import DecodePlan, PrefillPlan, decode_of, prefill_of
from rvllm.backends.cuda.ops.family import Family, Lowering, PagedPlans
from rvllm.errors import MissingKernelError
from rvllm.kernels.attention.specs import decode_rope_kernel, decode_turn_kernel, sparse_kernel
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Attention, BlockSparseAttention, Norm, Op, RopeKV

TURN_SEQS = 8  # up to which attn_decode_turn has been timed
TURN_GROUP = 2  # query heads of a key head: they, the key and the value are a slice each for its four warps


def turns(rope: Op, attention: Op) -> bool:
    """Whether a kernel of decode attention could rotate too: whole heads, by halves."""
    if not isinstance(rope, RopeKV) or not isinstance(attention, Attention) or rope.rope is None:
        return False
    return not rope.rope.interleaved and rope.rope.dim == attention.head_dim


@dataclass(frozen=True)
class Turning:
    """A decode attention kernel that rotates too, and what it is told for that, behind all else."""

    kernel: str
    parameters: Sequence[object]


def _decode(
    op: Op, dtype: DType, chip: DeviceInfo, seqs: int, longest: int, blocks: int, rotates: bool
) -> DecodePlan:
    assert isinstance(op, Attention | BlockSparseAttention)
    plan = decode_of(op, dtype, chip, seqs, longest, blocks, rotates)
    if isinstance(op, BlockSparseAttention):
        plan = replace(plan, kernel=sparse_kernel(plan.kernel, op.head_dim))
    return plan


def _prefill(op: Op, dtype: DType, chip: DeviceInfo) -> PrefillPlan:
    assert isinstance(op, Attention | BlockSparseAttention)
    plan = prefill_of(op, dtype, chip)
    if isinstance(op, BlockSparseAttention):
        plan = replace(plan, kernel=sparse_kernel(plan.kernel, op.head_dim))
    return plan


def _group(op: Op) -> int:
    assert isinstance(op, Attention | BlockSparseAttention)
    return op.heads // op.kv_heads


def _rope_kv(to: Lowering, stage: Stage) -> None:
    """Rotation, with norms of heads in front of it, or with attention behind it."""
    last = stage.ops[-1]
    if not isinstance(last, Attention):
        _rotate(to, stage.name, stage.ops)
        return
    *norms, rope = stage.ops[:-1]
    assert isinstance(rope, RopeKV)
    turning = _turning(to, norms, rope, last)
    if turning is None:
        _rotate(to, stage.name, stage.ops[:-1])
    _attend(to, stage.name, last, turning)


def _turning(to: Lowering, norms: Sequence[Op], rope: RopeKV, attention: Attention) -> Turning | None:
    """How decode attention rotates too, where a step has nothing but decodes and there is a kernel."""
    plan, angles = to.decode[attention.name], rope.rope
    if to.prefill is not None or to.chip.capability < 90:
        return None
    few = to.counts.seqs <= TURN_SEQS and attention.heads // attention.kv_heads <= TURN_GROUP
    ring = decode_rope_kernel(plan.kernel)
    if plan.ring or ring is not None:
        turned = not norms and angles is not None and turns(rope, attention)
        return Turning(ring, to.at.ropes[angles]) if ring and angles and turned else None
    kernel = decode_turn_kernel(plan.kernel) if few else None
    if kernel is None or (angles is not None and (angles.interleaved or angles.dim % 4)):
        return None
    kind, more = _head_norms(to, norms, rope)
    if kind not in ("", "_rms"):
        return None
    cos, sin = to.at.ropes[angles] if angles is not None else (0, 0)
    rotated = angles.dim if angles is not None else 0
    weights = more or [0, 0, *ints(0, 0), ctypes.c_float(0.0)]
    return Turning(kernel, [cos, sin, *ints(rotated, len(norms) > 0), *weights])


def _rotate(to: Lowering, name: str, ops: Sequence[Op]) -> None:
    *norms, op = ops
    assert isinstance(op, RopeKV)
    cos, sin = to.at.ropes[op.rope] if op.rope is not None else (0, 0)
    rotated = op.rope.dim if op.rope is not None else 0
    if op.cache.fp8 and op.head_dim > 256:
        raise MissingKernelError(f"no rope kernel for heads of {op.head_dim} elements over an FP8 cache")
    if rotated % 4:
        raise MissingKernelError(f"no rope kernel for {rotated} rotated elements, not a multiple of 4")
    interleaved = op.rope is not None and op.rope.interleaved
    k_cache, v_cache = to.at.caches[op.cache.name]
    heads, warps = op.heads + 2 * op.kv_heads, 4
    kind, more = _head_norms(to, norms, op)
    fp8 = op.cache.fp8
    many = (
        not norms
        and not interleaved
        and rotated % 16 == op.head_dim % 8 == 0
        and to.counts.tokens >= 4 * to.chip.sm_count
    )  # a block a row fills it
    suffix = "_rows" if many else "_interleaved" if interleaved else ""
    to.plan(
        name,
        f"sm80_{to.tag}_rope_kv{'_fp8' if fp8 else ''}{kind}{suffix}",
        lambda c: (c.tokens, 1, 1) if many else (-(-heads // warps), c.tokens, 1),
        32 * warps,
        to.at.buffers[op.qkv.name],
        k_cache,
        v_cache,
        cos,
        sin,
        to.at.tables,
        to.meta(to.layout.positions),
        to.meta(to.layout.token_slots),
        to.meta(NUM_TOKENS),
        *ints(op.qkv.width, to.shape.table_stride, op.heads, op.kv_heads, op.head_dim, rotated),
        *more,
    )


def _head_norms(to: Lowering, norms: Sequence[Op], op: RopeKV) -> tuple[str, list[object]]:
    """What the norms of its heads add to a RopeKV: to the kernel's name, and to its parameters."""
    if not norms:
        return "", []
    queries, keys = norms
    assert isinstance(queries, Norm)
    assert isinstance(keys, Norm)
    if op.head_dim % 2 or op.head_dim > 256:
        raise MissingKernelError(f"no norm kernel for heads of {op.head_dim} elements")
    steps = [
        op.head_dim if norm.weight is not None and norm.weight.elements == norm.width else 0
        for norm in (queries, keys)
    ]
    weights = [to.weight(norm.weight, "norm") for norm in (queries, keys)]
    return f"_{queries.kind_}", [*weights, *ints(*steps), ctypes.c_float(queries.eps)]


def _attention(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, Attention | BlockSparseAttention)
    _attend(to, stage.name, op)


def _attend(
    to: Lowering, name: str, op: Attention | BlockSparseAttention, turning: Turning | None = None
) -> None:
    soft_cap, window, sight = 0.0, 0, list[object]()
    if isinstance(op, Attention):
        soft_cap, window = op.soft_cap or 0.0, op.window or 0
    else:
        sparsity = op.sparsity
        facts = (sparsity.size, sparsity.local, sparsity.stride, sparsity.head_step)
        sight = [ctypes.c_int(fact) for fact in facts]
    numbers = (
        *ints(op.qkv.width, op.out.width, to.shape.table_stride, op.kv_heads, op.heads // op.kv_heads),
        ctypes.c_float(op.scale),
        ctypes.c_float(soft_cap),
        ctypes.c_int(window),
    )
    places = (to.at.buffers[op.out.name], to.at.buffers[op.qkv.name], *to.at.caches[op.cache.name])
    seqs = ctypes.c_int(to.layout.seqs)
    caches, rows = to.at.caches[op.cache.name], to.shape.kv_blocks * op.kv_heads * KV_BLOCK
    maps = [to.boxes(at, rows, op.head_dim, KV_BLOCK) for at in caches]
    attend(
        to,
        name,
        op,
        places,
        numbers,
        one=(seqs, *sight),
        several=sight,
        heads=op.kv_heads,
        maps=maps,
        turning=turning,
        persistent=((*places[:2], *(caches if op.cache.fp8 else maps)), (*numbers[:-2], numbers[-1])),
    )


def attend(
    to: Lowering,
    name: str,
    op: Op,
    places: Sequence[int],
    numbers: Sequence[object],
    *,
    one: Sequence[object],
    several: Sequence[object] = (),
    heads: int = 1,
    maps: Sequence[MatrixMap | int] = (),
    turning: Turning | None = None,
    persistent: tuple[Sequence[object], Sequence[object]] = ((), ()),
) -> None:
    """Attention over the paged cache: a launch for single tokens, and one for longer runs of them.

    op: whose plans these are. places: addresses of the result, the queries and the cache. numbers: what both
    kernels are told; behind that comes what only the first is, `one`, and what only the second is, `several`.
    heads: blocks of each tile. maps: of the cache, for kernels that use the copy engine, or its addresses
    where it is in E4M3. turning: what the decode kernel rotates with, where it does. persistent: what the
    prefill kernel of persistent blocks is told instead of `places` and of `numbers`.
    """
    seqs = (to.at.tables, to.meta(to.layout.seq_slots), to.meta(to.layout.kv_lens))
    shared: tuple[object, ...] = (*places, *seqs)
    decode = to.decode[op.name]
    to.plan(
        name,
        decode.kernel if turning is None else turning.kernel,
        fixed(decode.grid),
        decode.block,
        *shared,
        to.meta(NUM_DECODES),
        to.at.partial,
        to.at.arrivals,
        *numbers,
        *one,
        *(maps if decode.ring else ()),
        *(() if turning is None else turning.parameters),
        smem=decode.smem,
        why="sequences with one token",
    )
    if to.prefill is None:
        return
    prefill = to.prefill[op.name]
    tiles = [to.meta(to.layout.query_offsets), to.meta(to.layout.tile_list)]
    grid = fixed(to.layout.tiles, heads)
    if prefill.persistent:
        front, numbers = persistent
        shared = (*front, *seqs)
        tiles.append(to.meta(NUM_TILES))
        grid = fixed(min(prefill.persistent, to.layout.tiles * heads))
    to.plan(
        name,
        prefill.kernel,
        grid,
        prefill.block,
        *shared,
        *tiles,
        *numbers,
        *several,
        smem=prefill.smem,
        why="sequences with several tokens",
    )


FAMILY = Family(
    emitters={RopeKV: _rope_kv, Attention: _attention, BlockSparseAttention: _attention},
    leading=(RopeKV,),
    paged=dict.fromkeys((Attention, BlockSparseAttention), PagedPlans(_decode, _prefill, _group)),
)
