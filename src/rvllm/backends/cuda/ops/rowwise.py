"""Ops on single rows: embedding, norms, activations, residuals, the rows to sample: their launches.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from rvllm.backends.cuda.device.launches import ints
from rvllm.backends.cuda.formats.fp8 import NORMED, NORMED_SCALES, activation_capacity
from rvllm.backends.cuda.formats.fp8_plan import activation_pitch
from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_SAMPLES, NUM_TOKENS
from rvllm.backends.cuda.layout.packed import PackedWeight, WeightLayout
from rvllm.backends.cuda.ops.decode.chains import AddFront
from rvllm.backends.cuda.ops.decode.step import NormFront
from rvllm.backends.cuda.ops.family import Family, Lowering, Wanted
from rvllm.errors import MissingKernelError
from rvllm.kernels.rowwise.specs import norm_add_norm_kernel, norm_kernel, quantised_norm_kernel
from rvllm.program.ops.dense import Activate, Add, ClampedGate, Embed, GatedActivation, GatherRows, Norm, Op

BLOCK = 256  # threads of elementwise kernels


def _embed(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, Embed)
    blocks = PackedWeight(op.table, "table", 0).blocks
    to.plan(
        stage.name,
        f"sm80_{to.tag}_embed" if blocks is None else f"sm80_{to.tag}_embed_{blocks.stored.lower()}",
        lambda c: (c.tokens, 1, 1),
        128,
        to.at.buffers[op.out.name],
        to.weight(op.table, "table"),
        to.meta(to.layout.token_ids),
        to.meta(to.layout.token_slots),
        to.at.last_tokens,
        to.meta(NUM_TOKENS),
        ctypes.c_int(op.out.width),
        ctypes.c_float(op.scale),
    )


def norm(to: Lowering, stage: Stage) -> None:
    """A Norm: alone, after an Add, or before one, which another Norm may follow."""
    *before, op = stage.ops
    first = before[0] if before else None
    if isinstance(first, Norm):
        _norm_add_norm(to, stage)
        return
    assert isinstance(op, Norm)
    assert first is None or isinstance(first, Add)
    if op.group is not None or op.width is not None:
        _norm_groups(to, stage.name, op)
        return
    find = quantised_norm_kernel if op.out.name in to.quantised else norm_kernel
    kernel, threads = find(to.dtype.value, op.kind_, op.x.width, first is not None)
    rows = to.rows(op.x.rows)
    out: list[object] = [to.at.buffers[op.out.name]]
    behind: list[object] = []
    if op.out.name in to.quantised:
        out = [to.at.scratch[NORMED], to.at.scratch[NORMED_SCALES]]
        behind = [
            ctypes.c_int(n) for n in (activation_pitch(op.x.width), activation_capacity(to.shape.tokens))
        ]
    to.plan(
        stage.name,
        kernel,
        lambda c: (rows(c), 1, 1),
        threads,
        *out,
        to.at.buffers[op.x.name],
        to.at.buffers[first.y.name] if first else 0,
        to.weight(op.weight, "norm"),
        to.weight(op.bias, "norm"),
        ctypes.c_int(op.x.width),
        ctypes.c_float(op.eps),
        ctypes.c_float(first.scale if first else 1.0),
        *behind,
        does=None if behind else _front(to, first, op),
    )


def _front(to: Lowering, add: Add | None, op: Norm) -> NormFront | AddFront:
    """The norm as what stands before a product, which may take it over."""
    front = NormFront(
        x=to.at.buffers[op.x.name],
        weight=to.weight(op.weight, "norm"),
        bias=to.weight(op.bias, "norm"),
        normed=to.at.buffers[op.out.name],
        width=op.x.width,
        eps=op.eps,
        layer=op.kind_ == "layer",
    )
    return front if add is None else AddFront(to.at.buffers[add.y.name], add.scale, front)


def _norm_add_norm(to: Lowering, stage: Stage) -> None:
    before, add, after = (*stage.ops, None)[:3]
    assert isinstance(before, Norm)
    assert isinstance(add, Add)
    assert after is None or isinstance(after, Norm)
    kernel, threads = norm_add_norm_kernel(to.dtype.value, add.x.width)
    rows = to.rows(add.x.rows)
    to.plan(
        stage.name,
        kernel,
        lambda c: (rows(c), 1, 1),
        threads,
        to.at.buffers[after.out.name] if after else 0,
        to.at.buffers[add.x.name],
        to.at.buffers[before.x.name],
        to.weight(before.weight, "norm"),
        to.weight(after.weight, "norm") if after else 0,
        ctypes.c_int(add.x.width),
        ctypes.c_float(before.eps),
        ctypes.c_float(after.eps if after else 0.0),
        ctypes.c_float(add.scale),
    )


def _norm_groups(to: Lowering, name: str, op: Norm) -> None:
    width = op.width if op.width is not None else op.x.width - op.start
    group = op.group or width
    if op.out != op.x or group % 2 or group > 256:
        raise MissingKernelError(f"no norm kernel for slices of {group} elements")
    slices, warps = width // group, 4
    each = op.weight is not None and op.weight.elements == width and slices > 1
    rows = to.rows(op.x.rows)
    to.plan(
        name,
        f"sm80_{to.tag}_norm_groups_{op.kind_}",
        lambda c: (-(-slices // warps), rows(c), 1),
        32 * warps,
        to.at.buffers[op.x.name],
        to.weight(op.weight, "norm"),
        to.weight(op.bias, "norm"),
        *ints(op.x.width, op.start, slices, group, group if each else 0),
        ctypes.c_float(op.eps),
    )


def _activation(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, GatedActivation | ClampedGate | Activate)
    more: list[object] = []
    match op:
        case GatedActivation():
            form = f"gated_{op.activation}"
        case ClampedGate():
            form, more = "gated_clamped", [ctypes.c_float(op.limit or 0.0), ctypes.c_float(op.alpha)]
        case Activate():
            form = f"act_{op.activation}"
    width, rows = op.out.width, to.rows(op.out.rows)
    if width % 8:
        raise MissingKernelError(f"no activation kernel for rows of {width} elements")
    to.plan(
        stage.name,
        f"sm80_{to.tag}_{form}",
        lambda c: (-(-width // 8 // BLOCK), rows(c), 1),
        BLOCK,
        to.at.buffers[op.out.name],
        to.at.buffers[op.x.name],
        ctypes.c_int(width),
        *more,
    )


def _add(to: Lowering, stage: Stage) -> None:
    if len(stage.ops) == 2:
        norm(to, stage)
        return
    (op,) = stage.ops
    assert isinstance(op, Add)
    rows = to.rows(op.x.rows)
    elements = rows(to.counts) * op.x.width
    to.plan(
        stage.name,
        f"sm80_{to.tag}_add",
        lambda c: (min(-(-elements // 8 // BLOCK), 8 * to.chip.sm_count), 1, 1),
        BLOCK,
        to.at.buffers[op.x.name],
        to.at.buffers[op.y.name],
        ctypes.c_uint64(elements // 8 * 8),
        ctypes.c_float(op.scale),
    )


def _gather(to: Lowering, stage: Stage) -> None:
    op, *more = stage.ops
    assert isinstance(op, GatherRows)
    second: list[object] = [0, 0, ctypes.c_int(0)]
    for other in more:
        assert isinstance(other, GatherRows)
        second = [
            to.at.buffers[other.out.name], to.at.buffers[other.x.name], ctypes.c_int(other.x.width)
        ]  # fmt: skip
    to.plan(
        stage.name,
        f"sm80_{to.tag}_gather_rows",
        lambda c: (c.samples, 1, 1),
        128,
        to.at.buffers[op.out.name],
        to.at.buffers[op.x.name],
        to.meta(to.layout.sample_rows),
        to.meta(NUM_SAMPLES),
        ctypes.c_int(op.x.width),
        *second,
    )


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    match op:
        case Embed():
            return ((op.table, "table"),)
        case Norm():
            return ((op.weight, "norm"), (op.bias, "norm"))
    return ()


FAMILY = Family(
    emitters={
        Embed: _embed,
        Norm: norm,
        GatedActivation: _activation,
        ClampedGate: _activation,
        Activate: _activation,
        Add: _add,
        GatherRows: _gather,
    },
    weights=_weights,
)
