"""What a step costs: bytes moved and floating-point operations of every op, and the floor they imply.

Counts are of what the algorithm needs: each weight read once, each activation read and written once, the
KV cache read as far as the queries look back. A multiply-add is two operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch

from rvllm.program.ops.dense import (
    Activate,
    Add,
    Attention,
    BlockSparseAttention,
    Buffer,
    ClampedGate,
    Embed,
    Experts,
    GatedActivation,
    GatherRows,
    HeadLinear,
    HideTokens,
    LatentAttention,
    LatentRopeKV,
    Linear,
    Logits,
    Norm,
    Op,
    Program,
    RopeKV,
    Route,
    Sample,
    Weight,
)
from rvllm.program.ops.encoder import AddPositions, Classify, Pool, TextAttention
from rvllm.program.ops.mamba2 import CHUNK, CausalConv, GatedNorm, StateScan


@dataclass(frozen=True)
class StepShape:
    """`sequences` alike: each computes `query_len` tokens and then has `context` tokens in the cache."""

    sequences: int
    query_len: int
    context: int

    @property
    def tokens(self) -> int:
        """T, rows of the flat batch."""
        return self.sequences * self.query_len

    @property
    def samples(self) -> int:
        """S, rows whose logits are wanted."""
        return self.sequences

    def rows(self, buffer: Buffer) -> int:
        return self.tokens if buffer.rows == "tokens" else self.samples


@dataclass(frozen=True)
class Cost:
    """Bytes by what is moved, and operations."""

    weight_bytes: int = 0
    activation_bytes: int = 0
    kv_bytes: int = 0
    flops: int = 0

    @property
    def nbytes(self) -> int:
        """All bytes moved."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.kv_bytes + other.kv_bytes,
            self.flops + other.flops,
        )

    def floor_seconds(self, bandwidth: float, flops_per_second: float) -> float:
        """The least time it can take: bytes and operations overlap perfectly (Williams et al. 2009)."""
        return max(self.nbytes / bandwidth, self.flops / flops_per_second)


WeightBytes = Callable[[Weight], int]


def weight_bytes(program: Program, stored: Mapping[str, int] | None = None) -> WeightBytes:
    """Bytes a weight takes: `stored` by name where known, else those of its format or of the dtype."""
    known = stored or {}
    return lambda weight: known.get(weight.name, weight.nbytes(program.dtype.size))


def kv_bytes_per_token(program: Program) -> int:
    """Bytes one token takes in all caches."""
    return sum(cache.token_bytes(program.dtype.size) for cache in program.caches)


def op_cost(program: Program, op: Op, shape: StepShape, stored: Mapping[str, int] | None = None) -> Cost:
    size = weight_bytes(program, stored)
    activations = sum(shape.rows(b) * b.width * b.dtype.size for b in (*op.reads, *op.writes))
    plain = Cost(weight_bytes=sum(size(w) for w in op.weights), activation_bytes=activations)
    return particulars(op, shape, plain, program.dtype.size)


def program_cost(program: Program, shape: StepShape, stored: Mapping[str, int] | None = None) -> Cost:
    return sum((op_cost(program, op, shape, stored) for op in program.ops), Cost())


@singledispatch
def particulars(op: Op, shape: StepShape, plain: Cost, size: int) -> Cost:
    """The op's cost, given `plain` (all its weights and buffers moved once, no operations).

    size: bytes of an element of the model's type. An op type without a rule of its own is refused: a cost
    that is silently zero would make floors wrong.
    """
    raise TypeError(f"no cost rule for op {op.kind}")


Plain = (
    Linear | Logits | HeadLinear | Activate | GatedActivation | ClampedGate | Norm | Add | Sample | Route
    | TextAttention | Pool | Classify
)  # fmt: skip
"""Ops that move all their weights and buffers once."""


@particulars.register
def _(op: Plain, shape: StepShape, plain: Cost, size: int) -> Cost:
    return replace(plain, flops=_flops(op, shape))


def _flops(op: Plain, shape: StepShape) -> int:
    match op:
        case Linear() | Logits() | HeadLinear():
            return 2 * shape.rows(op.x) * op.weight.elements
        case Activate() | GatedActivation() | ClampedGate():
            each = 4 if isinstance(op, Activate) else 5 if isinstance(op, GatedActivation) else 9
            return each * shape.rows(op.out) * op.out.width
        case Norm():
            return (4 if op.kind_ == "rms" else 7) * shape.rows(op.x) * (op.width or op.x.width)
        case Add():
            return (1 if op.scale == 1.0 else 2) * shape.rows(op.x) * op.x.width
        case Sample():
            return shape.samples * op.logits.width
        case Route():
            return shape.tokens * (2 * op.weight.elements + 10 * op.weight.shape[0])
        case TextAttention():
            return shape.tokens * shape.query_len * op.heads * (4 * op.head_dim + 5)
        case Pool():
            return (shape.tokens + 3 * shape.samples) * op.x.width
        case Classify():
            return 2 * shape.samples * sum(w.elements for w in op.weights)


@particulars.register
def _(op: Embed, shape: StepShape, plain: Cost, size: int) -> Cost:
    return replace(plain, weight_bytes=plain.weight_bytes // op.table.shape[0] * shape.tokens)


@particulars.register
def _(op: GatherRows, shape: StepShape, plain: Cost, size: int) -> Cost:
    return Cost(activation_bytes=2 * shape.rows(op.out) * op.out.width * op.out.dtype.size)


@particulars.register
def _(op: HideTokens, shape: StepShape, plain: Cost, size: int) -> Cost:
    return Cost(activation_bytes=shape.samples * len(op.tokens) * op.logits.dtype.size)


@particulars.register
def _(op: RopeKV | LatentRopeKV, shape: StepShape, plain: Cost, size: int) -> Cost:
    keys = op.kv_heads if isinstance(op, RopeKV) else 1
    rotated = 0 if op.rope is None else op.rope.dim * (op.heads + keys)
    written = shape.tokens * op.cache.token_bytes(size)
    return replace(plain, kv_bytes=written, flops=3 * shape.tokens * rotated)


@particulars.register
def _(op: Attention | LatentAttention, shape: StepShape, plain: Cost, size: int) -> Cost:
    window = (op.window if isinstance(op, Attention) else None) or shape.context
    value = op.cache.value_dim if isinstance(op, Attention) else op.rank
    before = shape.context - shape.query_len
    looked_at = sum(min(before + i + 1, window) for i in range(shape.query_len))
    return _attended(
        op, shape, plain, size, looked_at, min(shape.context, window + shape.query_len - 1), value
    )


@particulars.register
def _(op: BlockSparseAttention, shape: StepShape, plain: Cost, size: int) -> Cost:
    """A head sees its local blocks and one in `stride` before them, a group of heads that many more."""
    sparsity, before = op.sparsity, shape.context - shape.query_len
    near = sparsity.local * sparsity.size

    def seen(position: int, share: float) -> float:
        return min(position + 1, near) + max(0, position + 1 - near) * share

    looked_at = sum(seen(before + i, 1 / sparsity.stride) for i in range(shape.query_len))
    patterns = op.heads // op.kv_heads if sparsity.head_step else 1
    read = seen(shape.context - 1, min(1.0, patterns / sparsity.stride))
    return _attended(op, shape, plain, size, looked_at, read, op.cache.value_dim)


def _attended(
    op: Attention | LatentAttention | BlockSparseAttention, shape: StepShape, plain: Cost, size: int,
    looked_at: float, read: float, value: int,
) -> Cost:  # fmt: skip
    """looked_at: keys that a sequence's queries see, summed; read: keys read; value: elements of a value."""
    return replace(
        plain,
        kv_bytes=int(shape.sequences * read * op.cache.token_bytes(size)),
        flops=int(shape.sequences * looked_at * op.heads * (2 * op.cache.key_dim + 2 * value + 5)),
    )


@particulars.register
def _(op: Experts, shape: StepShape, plain: Cost, size: int) -> Cost:
    """Weights of the experts that are hit: of E, each token choosing k evenly, E * (1 - (1 - k / E)^T).

    Those that every token has come on top.
    """
    experts, chosen = op.up.shape[0] - op.always, op.ids.width - op.always
    hit = experts * (1.0 - (1.0 - chosen / experts) ** shape.tokens) + op.always
    elements = (op.up.elements + op.down.elements) // op.up.shape[0]
    each = 2 * elements + 5 * op.down.shape[2] + 2 * op.out.width
    return replace(
        plain,
        weight_bytes=int(plain.weight_bytes * hit / op.up.shape[0]),
        flops=shape.tokens * op.ids.width * each,
    )


@particulars.register
def _(op: AddPositions, shape: StepShape, plain: Cost, size: int) -> Cost:
    row = plain.weight_bytes // sum(w.shape[0] for w in op.weights)
    rows = shape.tokens + (op.kinds is not None)
    return replace(plain, weight_bytes=row * rows, flops=shape.tokens * op.x.width * len(op.weights))


@particulars.register
def _(op: CausalConv, shape: StepShape, plain: Cost, size: int) -> Cost:
    width, kernel = op.weight.shape
    return replace(
        plain,
        activation_bytes=shape.tokens * width * (op.x.dtype.size + op.out.dtype.size),
        kv_bytes=2 * 4 * op.state.elements * shape.sequences,
        flops=shape.tokens * width * (2 * kernel + 5),
    )


@particulars.register
def _(op: StateScan, shape: StepShape, plain: Cost, size: int) -> Cost:
    """The state is read once a sequence and written when a chunk ends; the newest chunk lies beside it."""
    inner, before = op.heads * op.dim, shape.context - shape.query_len
    ended = min(1, shape.context // CHUNK - before // CHUNK)
    newest = 4 * (op.xbc.width + op.heads) * (before % CHUNK + shape.query_len)
    in_chunks = 2 * CHUNK * (inner + op.groups * op.size) + 3 * CHUNK * op.heads
    return replace(
        plain,
        activation_bytes=plain.activation_bytes - shape.tokens * (op.steps.width - op.heads) * size,
        kv_bytes=shape.sequences * (4 * inner * op.size * (1 + ended) + newest),
        flops=shape.tokens * (4 * inner * op.size + in_chunks),
    )


@particulars.register
def _(op: GatedNorm, shape: StepShape, plain: Cost, size: int) -> Cost:
    unread = shape.tokens * (op.gate.width - op.x.width) * size
    moved = plain.activation_bytes - unread
    return replace(plain, activation_bytes=moved, flops=shape.tokens * op.x.width * 9)
