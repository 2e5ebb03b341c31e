"""Sentence encoders: positions, attention within a text, pooling: their launches.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from rvllm.backends.cuda.device.launches import fixed
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_SEQS, NUM_TOKENS
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.family import Family, Lowering, Wanted
from rvllm.errors import MissingKernelError
from rvllm.kernels.encoder.specs import POOL_THREADS, POOLINGS, text_attention_kernel
from rvllm.program.ops.dense import Op
from rvllm.program.ops.encoder import AddPositions, Pool, TextAttention


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
        to.meta(NUM_TOKENS),
        ctypes.c_int(op.x.width),
        ctypes.c_int(op.offset),
    )


def _text_attention(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, TextAttention)
    kernel, smem = text_attention_kernel(to.dtype.value, op.head_dim)
    to.plan(
        stage.name,
        kernel,
        fixed(to.layout.tiles, op.heads),
        128,
        to.at.buffers[op.out.name],
        to.at.buffers[op.qkv.name],
        to.meta(to.layout.query_offsets),
        to.meta(to.layout.tile_list),
        ctypes.c_int(op.heads),
        ctypes.c_float(op.scale),
        smem=smem,
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
        ctypes.c_int(op.x.width),
        ctypes.c_int(POOLINGS.index(op.how)),
        ctypes.c_int(op.normalise),
    )


def _need_eights(width: int) -> None:
    if width % 8:
        raise MissingKernelError(f"no kernel for rows of {width} elements, not a multiple of 8")


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    return ((op.positions, "table"), (op.kinds, "table")) if isinstance(op, AddPositions) else ()


FAMILY = Family(
    emitters={AddPositions: _add_positions, TextAttention: _text_attention, Pool: _pool}, weights=_weights
)
