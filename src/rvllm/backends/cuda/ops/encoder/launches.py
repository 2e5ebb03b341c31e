"""Sentence encoders: positions, attention within a text, pooling: their launches.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from rvllm.backends.cuda.device.launches import fixed, ints
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_SEQS, NUM_TILES, NUM_TOKENS
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.encoder.plan import plan_text
from rvllm.backends.cuda.ops.family import Family, Lowering, Wanted
from rvllm.errors import MissingKernelError
from rvllm.kernels.encoder.specs import POOL_THREADS, POOLINGS
from rvllm.program.ops.dense import Op
from rvllm.program.ops.encoder import AddPositions, Pool, TextAttention

TILE = 64  # rows of a tile of keys


def _add_positions(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, AddPositions)
    _need_eights(op.x.width)
    to.plan(
        stage.name,
        f"sm80_{to.tag}_add_positions",
        lambda c: (c.tokens, 1, 1),
        128,
        to.at.buffers[op.x.name],
        to.weight(op.positions, "table"),
        to.weight(op.kinds, "table"),
        to.meta(to.layout.positions),
        to.meta(to.layout.kinds),
        to.meta(NUM_TOKENS),
        *ints(op.x.width, op.offset),
    )


def _text_attention(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, TextAttention)
    plan = plan_text(op.head_dim, to.dtype, to.chip)
    grid, qkv = fixed(to.layout.tiles, op.heads), to.at.buffers[op.qkv.name]
    boxes, count = list[object](), list[object]()
    if plan.persistent:
        grid = fixed(min(plan.persistent, to.layout.tiles * op.heads))
        boxes.append(to.boxes(qkv, to.shape.tokens, op.qkv.width, TILE))
        count.append(to.meta(NUM_TILES))
    to.plan(
        stage.name,
        plan.kernel,
        grid,
        plan.block,
        to.at.buffers[op.out.name],
        qkv,
        *boxes,
        to.meta(to.layout.query_offsets),
        to.meta(to.layout.tile_list),
        *count,
        ctypes.c_int(op.heads),
        ctypes.c_float(op.scale),
        smem=plan.smem,
    )


def _pool(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, Pool)
    _need_eights(op.x.width)
    to.plan(
        stage.name,
        f"sm80_{to.tag}_pool",
        lambda c: (c.seqs, 1, 1),
        POOL_THREADS,
        to.at.buffers[op.out.name],
        to.at.buffers[op.x.name],
        to.meta(to.layout.query_offsets),
        to.meta(NUM_SEQS),
        *ints(op.x.width, POOLINGS.index(op.how), op.normalise),
    )


def _need_eights(width: int) -> None:
    if width % 8:
        raise MissingKernelError(f"no kernel for rows of {width} elements, not a multiple of 8")


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    return ((op.positions, "table"), (op.kinds, "table")) if isinstance(op, AddPositions) else ()


FAMILY = Family(
    emitters={AddPositions: _add_positions, TextAttention: _text_attention, Pool: _pool}, weights=_weights
)
