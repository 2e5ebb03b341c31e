"""Mixtures of experts: routing and grouped products: their launches.

FAMILY: what the registry knows of them. How they are launched is in `router.py` and `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rvllm.backends.cuda.layout.fusion import Stage
from rvllm.backends.cuda.layout.metadata import NUM_TOKENS
from rvllm.backends.cuda.layout.packed import WeightLayout
from rvllm.backends.cuda.ops.family import Family, Lowering, Scratch, Wanted
from rvllm.backends.cuda.ops.moe.plan import ExpertsAt, ExpertsPlan, NormAfter, most_tiles
from rvllm.backends.cuda.ops.moe.quantised import reordered_width
from rvllm.backends.cuda.ops.moe.router import NORM_ROUTED, RouteAt, plan_route, route_part
from rvllm.backends.cuda.ops.rowwise import norm as norm_rows
from rvllm.kernels.moe.specs import BLOCKS, COMBINE_NORM_WIDTH, GROUPED_TOKENS
from rvllm.program.ops.dense import Add, Experts, Norm, Op, Program, Route

COMBINED_NORM = 1024  # tokens up to which a norm goes with the weighted sum before it


def _route(lowering: Lowering, stage: Stage) -> None:
    """A Route, or a Norm and the Route that reads it: one launch for few tokens, two for many."""
    op, norm = stage.ops[-1], stage.ops[0]
    assert isinstance(op, Route)
    if isinstance(norm, Norm) and lowering.counts.tokens > NORM_ROUTED:
        norm_rows(lowering, Stage((norm,)))
    fused = norm if isinstance(norm, Norm) and lowering.counts.tokens <= NORM_ROUTED else None
    buffers, scratch = lowering.at.buffers, lowering.at.scratch
    at = RouteAt(
        x=buffers[op.x.name],
        ids=buffers[op.ids.name],
        shares=buffers[op.shares.name],
        weight=lowering.weight(op.weight, "table"),
        bias=lowering.weight(op.bias, "norm"),
        logits=scratch["experts.logits"],
        arrivals=scratch["experts.arrivals"],
        num_tokens=lowering.meta(NUM_TOKENS),
        raw=buffers[fused.x.name] if fused else 0,
        norm_weight=lowering.weight(fused.weight, "norm") if fused else 0,
    )
    launch = plan_route(op, lowering.counts.tokens, lowering.tag, at, lowering.chip, fused)
    if lowering.counts.tokens == 1 and lowering.prefill is None:
        launch = replace(launch, does=route_part(op, at, fused))
    lowering.planned.append(launch)


def _experts(lowering: Lowering, stage: Stage) -> None:
    """Experts, the Add of their sum or not, and the Norm of that or not."""
    op, add, norm = (*stage.ops, None, None)[:3]
    assert isinstance(op, Experts)
    assert add is None or isinstance(add, Add)
    assert norm is None or isinstance(norm, Norm)
    buffers, scratch = lowering.at.buffers, lowering.at.scratch
    form: WeightLayout = "gated_stack" if op.gated else "stack"
    # What one launch adds the sum to. A norm does that itself, but one that the product behind it takes over.
    target = add if norm is None or _norm_goes_on(lowering) else None
    at = ExpertsAt(
        x=buffers[op.x.name],
        ids=buffers[op.ids.name],
        shares=buffers[op.shares.name],
        out=buffers[target.x.name if target else op.out.name],
        residual=buffers[target.x.name] if target else 0,
        up=lowering.weight(op.up, form),
        down=lowering.weight(op.down, "stack"),
        inner=scratch["experts.inner"],
        parts=scratch["experts.parts"],
        order=scratch["experts.order"],
        places=scratch["experts.places"],
        tiles=scratch["experts.tiles"],
        num_tiles=scratch["experts.num_tiles"],
        num_tokens=lowering.meta(NUM_TOKENS),
        reordered=scratch.get("experts.reordered", 0),
    )
    plan = ExpertsPlan(
        op, stage.name, lowering.counts.tokens, lowering.tag, lowering.chip, at, add.scale if add else 1.0
    )
    if norm is not None and plan.path != "one" and _normed_by_combine(lowering, norm):
        weight = lowering.weight(norm.weight, "norm")
        plan.norm = NormAfter(buffers[norm.out.name], buffers[norm.x.name], weight, norm.eps)
    lowering.planned += plan.launches()
    if norm is not None and plan.norm is None:
        norm_rows(lowering, Stage(stage.ops[2 if target else 1 :]))


def _norm_goes_on(lowering: Lowering) -> bool:
    """Whether a norm becomes part of the product behind it, see `ops/decode/chains.py`."""
    return lowering.counts.tokens == 1 and lowering.prefill is None and lowering.alone


def _normed_by_combine(lowering: Lowering, norm: Norm) -> bool:
    plain = norm.kind_ == "rms" and norm.weight is not None and norm.bias is None
    fits = norm.x.width <= COMBINE_NORM_WIDTH and lowering.counts.tokens <= COMBINED_NORM
    return plain and fits and norm.out.name not in lowering.quantised


def _weights(op: Op, stage: Stage, matrices: WeightLayout) -> Iterable[Wanted]:
    match op:
        case Route():
            return ((op.weight, "table"), (op.bias, "norm"))
        case Experts():
            return ((op.up, "gated_stack" if op.gated else "stack"), (op.down, "stack"))
    return ()


def _scratch(program: Program, tokens: int, seqs: int, capability: int) -> Scratch:
    """Bytes by name; empty where the program has no such op."""
    routes = [op for op in program.ops if isinstance(op, Route)]
    mixtures = [op for op in program.ops if isinstance(op, Experts)]
    if not mixtures:
        return {}
    entries = tokens * max(op.ids.width for op in mixtures)
    experts = max(op.down.shape[0] for op in mixtures)
    stacks = [weight for op in mixtures for weight in (op.up, op.down)]
    reordered = max(reordered_width(weight.format, weight.shape[-1]) for weight in stacks)
    return {
        "experts.logits": 4 * tokens * max((op.weight.shape[0] for op in routes), default=0),
        "experts.arrivals": 4 * tokens,
        "experts.inner": 2 * max(tokens * op.ids.width * op.down.shape[2] for op in mixtures),
        "experts.parts": 2
        * max(tokens * op.ids.width * max(op.down.shape[1], op.x.width) for op in mixtures),
        "experts.order": 4 * entries,
        "experts.places": 4 * entries,
        "experts.tiles": 16 * most_tiles(entries, experts, min(*GROUPED_TOKENS, *(b.tokens for b in BLOCKS))),
        "experts.num_tiles": 4,
        **({"experts.reordered": 2 * entries * reordered} if reordered else {}),
    }


FAMILY = Family(
    emitters={Route: _route, Experts: _experts}, leading=(Route,), weights=_weights, scratch=_scratch
)
