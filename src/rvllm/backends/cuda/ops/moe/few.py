"""How the experts of one token are launched, or of a few tokens where they keep a quantised format.

Each token has its experts to itself: the up matrices are one launch, the down matrices with the weighted sum
another. The kernels are `kernels/moe/one_token.cu` and `quantised_one.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

from rvllm.backends.cuda.device.launches import Planned, ints
from rvllm.backends.cuda.ops.decode.chains import Part
from rvllm.backends.cuda.ops.decode.step import Mixture, Step, Type
from rvllm.backends.cuda.ops.moe.quantised import OneToken, StackProduct, reordered_width, stack_product
from rvllm.kernels.gemm.tiles import TILE
from rvllm.kernels.moe.specs import (
    ONE_DOWN_STAGES,
    ONE_UP_BLOCKS,
    ONE_UP_STAGES,
    one_down_smem,
    one_up_smem,
    segments_of,
)
from rvllm.kernels.rowwise.specs import ACTIVATIONS
from rvllm.program.formats import WeightFormat

if TYPE_CHECKING:
    from rvllm.backends.cuda.ops.moe.plan import ExpertsPlan

FEW = 3  # tokens up to which quantised experts are each token's own: they share few
SLICE = 16  # rows of a block
STATIC = 2048  # shared memory that the kernels declare, at most
RESERVED = 1024  # of a block, by the driver


def fit(plan: ExpertsPlan) -> bool:
    """Whether there are few enough tokens, and room for a block of each kernel."""
    up, down = plan.op.up.format, plan.op.down.format
    if plan.tokens > (FEW if up and down else 1) or reordered_width(up, 1) or reordered_width(down, 1):
        return False
    return (up is None or _up_block(plan, up)[1] is not None) and (
        down is None or _down_block(plan, down)[1] is not None
    )


def launches(plan: ExpertsPlan) -> list[Planned]:
    op = plan.op
    up, down = _parts(plan)
    return [
        _quantised_up(plan, op.up.format) if op.up.format else replace(_up(plan), does=up),
        _quantised_down(plan, op.down.format) if op.down.format else replace(_down(plan), does=down),
    ]


def _parts(plan: ExpertsPlan) -> tuple[Part, Part]:
    """Both products of one token as steps of a mixture in one launch."""
    at, op, n = plan.at, plan.op, plan.n
    act = ACTIVATIONS.index(op.activation)
    mixture = Mixture(plan.experts, plan.top_k, op.always, act=act, gated=op.gated)
    k, width, residual = op.x.width, plan.width, plan.at.residual
    up = Step(at.up, at.x, at.inner, plan.up_rows, k, segments_of(k), width, type=Type.UP, mixture=mixture)
    down = Step(
        at.down, at.inner, at.out, n, width, segments_of(width), n, residual=residual,
        scale=plan.scale.value, type=Type.DOWN, mixture=mixture,
    )  # fmt: skip
    return Part(up), Part(down)


def _up(plan: ExpertsPlan) -> Planned:
    at, op, k, rows = plan.at, plan.op, plan.op.x.width, plan.up_rows
    blocks, segments = -(-k // TILE), segments_of(k)
    grid = (-(-rows // SLICE), plan.top_k)
    stages, slots = _up_ring(plan, grid[0] * grid[1], segments, -(-blocks // segments))
    act = ACTIVATIONS.index(op.activation)
    numbers = (
        plan.top_k, op.always, plan.experts - op.always, k, blocks, rows, plan.width, act, int(op.gated),
        slots,
    )  # fmt: skip
    return plan.planned(
        f"one_up_s{stages}", grid, 32 * segments, one_up_smem(segments, slots), "up",
        at.inner, at.x, at.up, at.ids, *ints(*numbers),
    )  # fmt: skip


def _up_ring(plan: ExpertsPlan, grid: int, segments: int, each: int) -> tuple[int, int]:
    """Stages of the kernel, and of the ring, of an up product: few where all `grid` blocks then fit."""
    many, few = ONE_UP_STAGES
    memory = one_up_smem(segments, min(few, each)) + RESERVED
    fit = min((plan.chip.smem_per_block + RESERVED) // memory, ONE_UP_BLOCKS)
    stages = few if grid <= fit * plan.chip.sm_count else many
    return stages, min(stages, each)


def _alone(plan: ExpertsPlan) -> int:
    """Shared memory that keeps a second block of a down product from a multiprocessor; 0 where it may come.

    Blocks that are no more than the multiprocessors get one each, by asking for more than half of its memory:
    all have as much to do, and two in one place would be the last. What is left of it takes a block of the
    next product.
    """
    few = -(-plan.n // SLICE) * plan.tokens <= plan.chip.sm_count
    return plan.chip.smem_per_block // 2 + 1024 if few else 0


def _down_room(plan: ExpertsPlan) -> int:
    return _alone(plan) or plan.chip.smem_per_block // 2 - 4096


def _down(plan: ExpertsPlan) -> Planned:
    blocks, segments = -(-plan.width // TILE), segments_of(plan.width)
    grid, each = -(-plan.n // SLICE), plan.top_k * -(-blocks // segments)
    room = _down_room(plan)
    stages = next(
        (s for s in ONE_DOWN_STAGES if one_down_smem(segments, s, plan.top_k) <= room), ONE_DOWN_STAGES[-1]
    )
    slots = min(stages, each)
    smem = max(_alone(plan), one_down_smem(segments, slots, plan.top_k))
    numbers = (plan.experts, plan.top_k, plan.width, blocks, plan.n, slots)
    at = plan.at
    return plan.planned(
        f"one_down_s{stages}", (grid,), 32 * segments, smem, "down and sum",
        at.out, at.inner, at.down, at.ids, at.shares, at.residual, *ints(*numbers), plan.scale,
    )  # fmt: skip


def _up_block(plan: ExpertsPlan, kept: WeightFormat) -> tuple[StackProduct, OneToken | None]:
    product = stack_product(kept, plan.up_rows, plan.op.x.width)
    return product, product.one_token(1, plan.chip.smem_per_block - STATIC)


def _down_block(plan: ExpertsPlan, kept: WeightFormat) -> tuple[StackProduct, OneToken | None]:
    """As small a block as `_down_room` says, or one that fits."""
    product = stack_product(kept, plan.n, plan.width)
    small = product.one_token(plan.top_k, _down_room(plan))
    return product, small or product.one_token(plan.top_k, plan.chip.smem_per_block - STATIC)


def _quantised_up(plan: ExpertsPlan, kept: WeightFormat) -> Planned:
    op, at, k = plan.op, plan.at, plan.op.x.width
    product, block = _up_block(plan, kept)
    assert block is not None
    numbers = (
        product.scales, plan.top_k, op.always, plan.experts - op.always, k, product.chunks, product.segments,
        plan.up_rows, plan.width, ACTIVATIONS.index(op.activation), int(op.gated), block.slots,
    )  # fmt: skip
    return plan.planned(
        f"{product.layout}_one_up", (-(-plan.up_rows // SLICE), plan.entries), 32 * block.warps, block.smem,
        f"up, {kept.label}", at.inner, at.x, at.up, at.ids, at.num_tokens, ctypes.c_uint64(product.stride),
        *ints(*numbers),
    )  # fmt: skip


def _quantised_down(plan: ExpertsPlan, kept: WeightFormat) -> Planned:
    at, grid = plan.at, -(-plan.n // SLICE)
    product, block = _down_block(plan, kept)
    assert block is not None
    numbers = (
        product.scales, plan.experts, plan.top_k, plan.width, product.chunks, product.segments, plan.n,
        block.slots,
    )  # fmt: skip
    return plan.planned(
        f"{product.layout}_one_down_s{block.stages}", (grid, plan.tokens), 32 * block.warps,
        max(_alone(plan), block.smem), f"down and sum, {kept.label}",
        at.out, at.inner, at.down, at.ids, at.shares, at.residual, at.num_tokens,
        ctypes.c_uint64(product.stride), *ints(*numbers), plan.scale,
    )  # fmt: skip
