"""Fixed patterns of neighbouring ops that one kernel computes, bit for bit as the separate ops would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rvllm.kernels.moe.specs import ROUTE_NORM_WIDTH
from rvllm.program.ops.dense import (
    Activate,
    Add,
    Attention,
    Buffer,
    ClampedGate,
    Experts,
    GatedActivation,
    GatherRows,
    HeadLinear,
    LatentAttention,
    LatentRopeKV,
    Linear,
    Norm,
    Op,
    Program,
    RopeKV,
    Route,
)
from rvllm.program.ops.mamba2 import CausalConv, StateScan

GATED = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Stage:
    """One op, or several that run as one kernel; `inner` buffers never exist in memory."""

    ops: tuple[Op, ...]
    inner: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The names of its ops, joined."""
        return " + ".join(op.name for op in self.ops)

    @property
    def reads(self) -> tuple[Buffer, ...]:
        """Buffers read from memory."""
        return tuple(b for op in self.ops for b in op.reads if b.name not in self.inner)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        """Buffers written to memory."""
        return tuple(b for op in self.ops for b in op.writes if b.name not in self.inner)


def fuse(program: Program, gated_epilogue: bool = True) -> list[Stage]:
    """The program's ops in order, with these patterns merged:

    Linear, activation of its result, gated or not: the product's epilogue (`gated_epilogue`).
    Linear, Add of its result: the residual add is the product's epilogue.
    Experts, Add of its result: likewise; with the Norm of the sum, one pass over the row.
    Norm, Add of its result, Norm of the sum or not: one pass over the row.
    Add, Norm of its result: likewise.
    CausalConv, StateScan of its result: the scan convolves when every sequence has one token.
    Norm, Route of its result: few tokens are normalised as they are routed.
    Norm of the query heads, Norm of the key heads, RopeKV: each head is normalised as it is rotated.
    RopeKV, those norms before it or not, Attention: heads are rotated as they are attended to when every
        sequence has one token.
    Norm of the latent, LatentRopeKV, HeadLinear of its queries: each is written once, where it is wanted.
    GatherRows, GatherRows: one pass over the rows.
    LatentAttention, HeadLinear of its result: the product puts together what several blocks attended to.

    A result is merged away only where nothing else reads it. A product that follows Experts without reading
    what they write goes before them: its weights arrive while experts are being chosen.
    """
    readers = Counter(b.name for op in program.ops for b in op.reads)
    stages: list[Stage] = []
    position = 0
    while position < len(program.ops):
        stage = _stage(program.ops[position : position + 4], readers, gated_epilogue)
        stages.append(stage)
        position += len(stage.ops)
    for i in range(1, len(stages) - 1):
        if isinstance(stages[i - 1].ops[-1], Route) and _may_overtake(stages[i + 1], stages[i]):
            stages[i], stages[i + 1] = stages[i + 1], stages[i]
    return stages


def _may_overtake(product: Stage, experts: Stage) -> bool:
    """Whether these are a product and experts that do not depend on each other."""
    if not isinstance(product.ops[0], Linear) or not isinstance(experts.ops[0], Experts):
        return False
    written = {b.name for b in experts.writes}
    touched = written | {b.name for b in experts.reads}
    return not (written & {b.name for b in product.reads} or touched & {b.name for b in product.writes})


def is_gate(op: Op | None) -> bool:
    """Whether it halves a product's width, and the matrix kernels can do it on the way out."""
    return isinstance(op, ClampedGate) or (isinstance(op, GatedActivation) and op.activation in GATED)


def _stage(ops: Sequence[Op], readers: Counter[str], epilogue: bool) -> Stage:
    """The stage that begins with the first of these ops."""
    op, after, third = ops[0], ops[1] if len(ops) > 1 else None, ops[2] if len(ops) > 2 else None
    match op, after:
        case Linear(), GatedActivation() | ClampedGate() | Activate():
            fits = epilogue and (is_gate(after) or isinstance(after, Activate))
            if fits and after.x == op.out and readers[op.out.name] == 1:
                return Stage((op, after), (op.out.name,))
        case Linear(), Add():
            if after.y == op.out and after.x != op.out and readers[op.out.name] == 1:
                return Stage((op, after), (op.out.name,))
        case Experts(), Add():
            if after.y == op.out and after.x != op.out and readers[op.out.name] == 1:
                if isinstance(third, Norm) and _norms_rows(third) and third.x == after.x:
                    return Stage((op, after, third))
                return Stage((op, after), (op.out.name,))
        case Norm(), Add():
            alone = _norms_rows(op) and op.kind_ == "rms" and op.weight is not None
            if alone and after.y == op.out and after.x != op.out and readers[op.out.name] == 1:
                follows = isinstance(third, Norm) and third.x == after.x and _norms_rows(third)
                if follows and isinstance(third, Norm) and third.kind_ == "rms" and third.weight is not None:
                    return Stage((op, after, third), (op.out.name,))
                return Stage((op, after), (op.out.name,))
        case Norm(), Norm():
            if isinstance(third, RopeKV) and _norms_heads(op, after, third):
                behind = ops[3:4] if _attends(third, ops[3:4]) else ()
                return Stage((op, after, third, *behind))
        case RopeKV(), Attention():
            if _attends(op, (after,)):
                return Stage((op, after))
        case Norm(), Route():
            plain = _norms_rows(op) and op.kind_ == "rms" and op.weight is not None and op.bias is None
            if plain and after.x == op.out and op.x.width <= ROUTE_NORM_WIDTH:
                return Stage((op, after))
        case Norm(), LatentRopeKV():
            if isinstance(third, HeadLinear) and _prepares(op, after, third, readers):
                return Stage((op, after, third))
        case LatentAttention(), HeadLinear():
            if after.x == op.out and after.tail == 0:
                return Stage((op, after))
        case CausalConv(), StateScan():
            if after.xbc == op.out and after.steps == op.x and readers[op.out.name] == 1:
                return Stage((op, after))
        case GatherRows(), GatherRows():
            return Stage((op, after))
        case Add(), Norm():
            if _norms_rows(after) and after.x == op.x:
                return Stage((op, after))
    return Stage((op,))


def _attends(rope: RopeKV, behind: Sequence[Op]) -> bool:
    """Whether what comes next is attention to the heads that are rotated."""
    attention = behind[0] if behind else None
    return isinstance(attention, Attention) and (attention.qkv, attention.cache) == (rope.qkv, rope.cache)


def _norms_rows(op: Norm) -> bool:
    return op.group is None and op.width is None and op.out != op.x


def _prepares(norm: Norm, rope: LatentRopeKV, absorb: HeadLinear, readers: Counter[str]) -> bool:
    """Whether the norm is that of the latent, and nothing reads queries or latent afterwards."""
    rotated = rope.rope.dim
    plain = norm.kind_ == "rms" and norm.weight is not None and norm.bias is None and norm.group is None
    joint = rope.q == rope.kv  # queries and latent in one row, see `join`
    start = rope.heads * rope.head_dim if joint else 0
    whole = norm.x == norm.out == rope.kv and (norm.start, norm.width) == (
        start,
        rope.cache.key_dim - rotated,
    )
    queries = absorb.x == rope.q and absorb.tail == rotated
    alone = readers[rope.q.name] == readers[rope.kv.name] == (4 if joint else 2)
    return plain and whole and queries and alone


def _norms_heads(queries: Norm, keys: Norm, rope: RopeKV) -> bool:
    """Whether these are the norms of all query and all key heads that the RopeKV then rotates."""
    ends = ((0, rope.heads), (rope.heads, rope.kv_heads))
    return all(
        norm.x == norm.out == rope.qkv
        and norm.group == rope.head_dim
        and norm.start == first * rope.head_dim
        and norm.width == count * rope.head_dim
        and norm.bias is None
        and (norm.kind_, norm.eps) == (queries.kind_, queries.eps)
        for norm, (first, count) in zip((queries, keys), ends, strict=True)
    )
