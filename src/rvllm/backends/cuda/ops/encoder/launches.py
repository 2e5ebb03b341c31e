"""Sentence encoders: positions, attention within a text, pooling: their launches.

EMITTERS: what plans the launches of a stage that an op of this type leads.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from rvllm.backends.cuda.device.launches import fixed
from rvllm.backends.cuda.layout.metadata import NUM_SEQS, NUM_TOKENS
from rvllm.backends.cuda.ops.family import Emitter
from rvllm.errors import MissingKernelError
from rvllm.kernels.encoder.specs import POOL_THREADS, POOLINGS, text_attention_kernel
from rvllm.program.ops.dense import Op
from rvllm.program.ops.encoder import AddPositions, Pool, TextAttention

if TYPE_CHECKING:
    from rvllm.backends.cuda.layout.fusion import Stage
    from rvllm.backends.cuda.lowering import Lowering


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


EMITTERS: dict[type[Op], Emitter] = {
    AddPositions: _add_positions,
    TextAttention: _text_attention,
    Pool: _pool,
}
