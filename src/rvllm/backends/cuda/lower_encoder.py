"""Encoders, block-sparse attention and small ops of single architectures: their launches.

EMITTERS: what plans the launches of a stage that begins with an op of this type. PAGED: how those
of them that attend to the paged cache are planned. `scratch` sizes the device
memory that these launches need beside the program's buffers.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

from rvllm.backends.cuda.attention import DecodePlan, PrefillPlan, decode_of, plan_prefill
from rvllm.backends.cuda.chip import Chip
from rvllm.backends.cuda.families import Emitter, PagedPlans, Scratch
from rvllm.backends.cuda.fuse import Stage
from rvllm.backends.cuda.launches import fixed
from rvllm.backends.cuda.metadata import NUM_SAMPLES, NUM_SEQS, NUM_TOKENS
from rvllm.errors import MissingKernelError
from rvllm.kernels.encoder_manifest import (
    HIDDEN_TOKENS,
    POOL_THREADS,
    POOLINGS,
    sparse_kernel,
    text_attention_kernel,
)
from rvllm.program.dtypes import DType
from rvllm.program.encoder import AddPositions, Pool, TextAttention
from rvllm.program.ops import BlockSparseAttention, ClampedGate, HideTokens, Op, Program

if TYPE_CHECKING:
    from rvllm.backends.cuda.lowering import Lowering

BLOCK = 256  # threads of elementwise kernels


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


def _clamped_gate(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, ClampedGate)
    width, rows = op.out.width, to.rows(op.out.rows)
    _need_eights(width)
    to.plan(
        stage.name,
        f"sm80_{to.tag}_gated_clamped",
        lambda c: (-(-width // 8 // BLOCK), rows(c), 1),
        BLOCK,
        to.at.buffers[op.out.name],
        to.at.buffers[op.x.name],
        ctypes.c_int(width),
        ctypes.c_float(op.limit or 0.0),
        ctypes.c_float(op.alpha),
    )


def _hide_tokens(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, HideTokens)
    for first in range(0, len(op.tokens), HIDDEN_TOKENS):
        ids = op.tokens[first : first + HIDDEN_TOKENS]
        to.plan(
            stage.name,
            "sm80_hide_tokens",
            lambda c: (c.samples, 1, 1),
            128,
            to.at.logits,
            to.meta(NUM_SAMPLES),
            ctypes.c_int(to.shape.logits_stride),
            ctypes.c_int(len(ids)),
            (ctypes.c_int * HIDDEN_TOKENS)(*ids),
        )


def _need_eights(width: int) -> None:
    if width % 8:
        raise MissingKernelError(f"no kernel for rows of {width} elements, not a multiple of 8")


def _sparse_decode(op: Op, dtype: DType, chip: Chip, seqs: int, longest: int, blocks: int) -> DecodePlan:
    assert isinstance(op, BlockSparseAttention)
    plan = decode_of(op, dtype, chip, seqs, longest, blocks)
    return replace(plan, kernel=sparse_kernel(plan.kernel, op.head_dim))


def _sparse_prefill(op: Op, dtype: DType, chip: Chip) -> PrefillPlan:
    assert isinstance(op, BlockSparseAttention)
    plan = plan_prefill(dtype, op.head_dim, smem_per_block=chip.smem_per_block)
    return replace(plan, kernel=sparse_kernel(plan.kernel, op.head_dim))


def _group(op: Op) -> int:
    assert isinstance(op, BlockSparseAttention)
    return op.heads // op.kv_heads


EMITTERS: dict[type[Op], Emitter] = {
    AddPositions: _add_positions,
    TextAttention: _text_attention,
    Pool: _pool,
    ClampedGate: _clamped_gate,
    HideTokens: _hide_tokens,
    BlockSparseAttention: lambda to, stage: to.attention(stage),
}
PAGED: dict[type[Op], PagedPlans] = {
    BlockSparseAttention: PagedPlans(_sparse_decode, _sparse_prefill, _group)
}


def scratch(program: Program, tokens: int, seqs: int) -> Scratch:
    """Bytes by name for steps of up to `tokens` tokens of `seqs` sequences; empty where it has no such op."""
    return {}
