"""Matrix products with the epilogues that `fuse` gives them: their launches, by whom the strategy says.

FAMILY: what the registry knows of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rvllm.backends.cuda.device.launches import fixed
from rvllm.backends.cuda.formats import device_format
from rvllm.backends.cuda.layout.fusion import Stage, is_gate
from rvllm.backends.cuda.layout.metadata import BEST_ONLY
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.decode.chains import ARRIVALS, PATHS
from rvllm.backends.cuda.ops.decode.step import Step
from rvllm.backends.cuda.ops.family import Family, Lowering, Scratch, Wanted
from rvllm.backends.cuda.ops.gemm import cutlass, sm80
from rvllm.backends.cuda.ops.gemm import plan as native
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.ops.gemm.cublas import KERNEL as CUBLAS
from rvllm.backends.cuda.ops.gemm.cublas import Matmul
from rvllm.backends.cuda.ops.gemm.epilogue import Epilogue, plan_product
from rvllm.errors import MissingKernelError
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import Activate, Add, ClampedGate, GatedActivation, Linear, Logits, Op, Program

GATED_KIND = {"silu": Kind.GATED_SILU, "gelu": Kind.GATED_GELU, "gelu_tanh": Kind.GATED_GELU_TANH}
PARTIALS = "gemm.partials"  # scratch: see `GemmPlan.partials`
ACT_KIND = {
    "silu": Kind.ACT_SILU, "gelu": Kind.ACT_GELU, "gelu_tanh": Kind.ACT_GELU_TANH, "relu": Kind.ACT_RELU,
    "relu2": Kind.ACT_RELU2,
}  # fmt: skip


def _linear(to: Lowering, stage: Stage) -> None:
    op, after = stage.ops[0], stage.ops[1] if len(stage.ops) == 2 else None
    assert isinstance(op, Linear)
    written = after.x if isinstance(after, Add) else stage.writes[0]
    out, pitch = to.at.buffers[written.name], written.width
    match after:
        case GatedActivation():
            end = Epilogue(out, pitch, "gated", GATED_KIND[after.activation])
        case ClampedGate():
            limit = after.limit or 0.0
            end = Epilogue(out, pitch, "gated", Kind.GATED_CLAMPED, scale=after.alpha, soft_cap=limit)
        case Activate():
            end = Epilogue(out, pitch, kind=ACT_KIND[after.activation])
        case Add():
            end = Epilogue(out, pitch, residual=out, scale=after.scale)
        case _:
            end = Epilogue(out, pitch)
    _product(to, stage, op, end)


def _logits(to: Lowering, stage: Stage) -> None:
    (op,) = stage.ops
    assert isinstance(op, Logits)
    end = Epilogue(
        to.at.logits, to.shape.logits_stride, kind=Kind.LOGITS, scale=op.scale, soft_cap=op.soft_cap or 0.0
    )
    to.leaves_best = to.leaves_best and _finds_best(to, stage, op)
    if to.leaves_best:
        end = replace(end, residual=to.meta(BEST_ONLY))
    _product(to, stage, op, end)


def _finds_best(to: Lowering, stage: Stage, op: Logits) -> bool:
    """Whether this product's kernels can leave the best logits alone: ours, of 16 bits and many rows."""
    ours = op.weight.format is None and to.strategy.provider(stage) == "native" and to.path not in PATHS
    rows, width = op.weight.shape
    return ours and rows == to.shape.vocab and native.segments_of(rows, width) == 1


def _product(to: Lowering, stage: Stage, op: Linear | Logits, end: Epilogue) -> None:
    """One matrix product over all rows of the step, with its epilogue."""
    if op.weight.format is not None:
        device_format(op.weight.format).product(to, stage.name, op, end)
        return
    match to.strategy.provider(stage):
        case "cublas":
            reason = to.strategy.why(stage)
            to.plan(stage.name, CUBLAS, fixed(1), 0, _matmul(to, op, end), why=reason)
        case "cutlass":
            _cutlass(to, stage, op, end)
        case "native":
            _native(to, stage, op, end)


def _cutlass(to: Lowering, stage: Stage, op: Linear | Logits, end: Epilogue) -> None:
    """The product by a kernel built from CUTLASS."""
    n, k, count, chip = end.rows(op), op.weight.shape[-1], to.rows(op.x.rows)(to.counts), to.chip
    named, why = to.strategy.variant(stage, count), to.strategy.why(stage)
    if named:
        plan = cutlass.variant(n, k, count, to.tag, cutlass.tile_named(named), chip.sm_count, why)
    else:
        plan = cutlass.plan_cutlass(n, k, count, to.tag, chip.sm_count, chip.capability, why)
    plan_product(to, stage.name, plan, op, end)


def _native(to: Lowering, stage: Stage, op: Linear | Logits, end: Epilogue) -> None:
    """The product by a kernel of ours."""
    n, k, count, chip = end.rows(op), op.weight.shape[-1], to.rows(op.x.rows)(to.counts), to.chip
    if count == 1 and to.prefill is None and _stands_alone(to, stage, end):
        _alone(to, stage.name, op, end)
        return
    plan = native.plan_gemm(n, k, count, to.tag, chip.sm_count, chip.capability)
    if named := to.strategy.variant(stage, count):
        plan = native.variant(
            n,
            k,
            count,
            to.tag,
            *native.way_named(named),
            chip.sm_count,
            to.strategy.why(stage),
            chip.capability,
        )
    partials = {"partials": to.at.scratch[PARTIALS]} if plan.partials else {}
    plan_product(to, stage.name, plan, op, end, **partials)


def _stands_alone(to: Lowering, stage: Stage, end: Epilogue) -> bool:
    """Whether one token's product has a kernel of its own."""
    if to.path in PATHS:
        return True
    return to.alone and end.kind != Kind.LOGITS and not to.strategy.variant(stage, 1)


def _alone(to: Lowering, name: str, op: Linear | Logits, end: Epilogue) -> None:
    """One token's product as a launch of its own, which a `Joiner` may join with its neighbours."""
    k = op.weight.shape[-1]
    step = Step(
        weights=to.weight(op.weight, end.form),
        x=to.at.buffers[op.x.name],
        out=end.out,
        rows=end.rows(op),
        k=k,
        segments=native.segments_of(end.rows(op), k),
        pitch=end.pitch,
        bias=to.weight(op.bias, "gated_bias" if end.form == "gated" else "bias"),
        residual=end.residual,
        kind=end.kind,
        scale=end.scale,
        soft_cap=end.soft_cap,
    )
    to.planned.append(to.joiner().launch(name, (step,)))


def _matmul(to: Lowering, op: Linear | Logits, end: Epilogue) -> Matmul:
    """The product for cuBLASLt. Raises MissingKernelError for an epilogue that it cannot do."""
    bias_too = op.bias is not None and isinstance(op, Logits)
    if end.soft_cap or (end.residual and end.scale != 1.0) or bias_too:
        raise MissingKernelError("cuBLAS has no such epilogue; use --gemm-strategy native")
    rows, k = op.weight.shape
    return Matmul(
        x=to.at.buffers[op.x.name],
        weight=to.weight(op.weight, "table"),
        out=end.out,
        bias=to.weight(op.bias, "bias"),
        residual=end.residual,
        tokens=to.rows(op.x.rows)(to.counts),
        rows=rows,
        width=k,
        pitch=end.pitch,
        scale=end.scale,
        bf16=to.dtype is DType.BF16,
        float_out=isinstance(op, Logits),
        workspace=to.at.gemm_workspace,
    )


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    assert isinstance(op, Linear | Logits)
    if any(is_gate(after) for after in stage.ops[1:]):
        return ((op.weight, "gated"), (op.bias, "gated_bias"))
    return ((op.weight, matrices), (op.bias, "bias"))


def _scratch(program: Program, tokens: int, seqs: int, capability: int) -> Scratch:
    """What products need, which share it: of quantised weights, and where K is split without clusters."""
    found: Scratch = {}
    for weight in (op.weight for op in program.ops if isinstance(op, Linear | Logits)):
        if weight.format is not None:
            needed = device_format(weight.format).scratch(weight, max(tokens, seqs), capability)
        else:
            rows, k = weight.shape
            split = capability != 90 and native.segments_of(rows, k) > 1
            needed = {PARTIALS: sm80.most_partial_bytes(rows, native.segments_of(rows, k))} if split else {}
        for name, nbytes in needed.items():
            found[name] = max(nbytes, found.get(name, 0))
    return {**found, ARRIVALS: 8}


FAMILY = Family(emitters={Linear: _linear, Logits: _logits}, weights=_weights, scratch=_scratch)
