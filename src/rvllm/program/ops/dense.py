"""The vocabulary of a model program: buffers, weights and ops.

A program is a flat list of ops over named buffers. Every backend runs the same list; what an op
computes is defined by its docstring and by the NumPy reference in `backends/cpu`. Ops are plain data:
no op knows a backend, a batch or a pointer.

Here are the ops that most models have, and all words of the vocabulary to import; `base.py` has what ops
are made of, `attention.py` and `moe.py` those of caches and of experts. Only some models have what stands in
`mamba2.py` and `encoder.py`.

Shapes: T is the number of tokens in the step's flat batch, S the number of rows whose logits are
wanted. All sequences of the step lie one behind the other in the T rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from rvllm.program.dtypes import DType
from rvllm.program.ops.attention import (
    Attention,
    BlockSparseAttention,
    BlockSparsity,
    HeadLinear,
    LatentAttention,
    LatentRopeKV,
    RopeKV,
)
from rvllm.program.ops.base import Activation, Buffer, KVCache, Op, Part, Rows, StateCache, Weight
from rvllm.program.ops.moe import Experts, Route
from rvllm.program.rope import Rope

__all__ = [
    "Activate",
    "Activation",
    "Add",
    "Attention",
    "BlockSparseAttention",
    "BlockSparsity",
    "Buffer",
    "ClampedGate",
    "Embed",
    "Experts",
    "GatedActivation",
    "GatherRows",
    "HeadLinear",
    "HideTokens",
    "KVCache",
    "LatentAttention",
    "LatentRopeKV",
    "Linear",
    "Logits",
    "Norm",
    "Op",
    "Part",
    "Program",
    "RopeKV",
    "Route",
    "Rows",
    "Sample",
    "StateCache",
    "Weight",
]  # the vocabulary, whichever file a word stands in


@dataclass(frozen=True, kw_only=True)
class Embed(Op):
    """out[t] = table[token[t]] * scale; table [vocab, width]."""

    READS = ()
    table: Weight
    out: Buffer
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Norm(Op):
    """Normalises rows of x, or each `group` consecutive elements of a row, in float32.

    rms:   x / sqrt(mean(x^2) + eps) * weight                 (Zhang & Sennrich 2019)
    layer: (x - mean) / sqrt(var + eps) * weight + bias       (Ba et al. 2016)
    group: None normalises the whole row with weight [width]; a number normalises each slice of that
    length: weight is [group] (one for all slices) or [slices * group] (one each).
    start, width: the columns of x that are normalised when not all (query and key inside a fused QKV);
    then out is x, updated in place.
    """

    x: Buffer
    out: Buffer
    weight: Weight | None
    bias: Weight | None = None
    kind_: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    group: int | None = None
    start: int = 0
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """out = x @ weight.T + bias; weight [N, K], x [rows, K], out [rows, N]; sums in float32."""

    x: Buffer
    out: Buffer
    weight: Weight
    bias: Weight | None = None


@dataclass(frozen=True, kw_only=True)
class GatedActivation(Op):
    """out = act(x[:, :width]) * x[:, width:]; x [rows, 2 * width] (SwiGLU, GeGLU; Shazeer 2020)."""

    x: Buffer
    out: Buffer
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class ClampedGate(Op):
    """out = g * sigmoid(alpha * g) * (u + 1): Phi-3-small's gegelu, built on the quick GELU (alpha 1.702).

    g = min(x[:, :width], limit), u = x[:, width:] clamped to [-limit, limit]; x [rows, 2 * width].
    limit None clamps nothing.
    """

    x: Buffer
    out: Buffer
    limit: float | None
    alpha: float = 1.702


@dataclass(frozen=True, kw_only=True)
class Activate(Op):
    """out = act(x), elementwise."""

    x: Buffer
    out: Buffer
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """x += y * scale (the residual connection); x is updated in place."""

    READS = ("x", "y")
    WRITES = ("x",)
    x: Buffer
    y: Buffer
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class GatherRows(Op):
    """out[s] = x[row[s]]: the rows whose logits the step wants; x [T, width], out [S, width]."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True, kw_only=True)
class Logits(Op):
    """out = cap(x @ weight.T * scale + bias) in float32; x [S, K], weight [vocab, K], out [S, vocab]."""

    x: Buffer
    out: Buffer
    weight: Weight
    bias: Weight | None = None
    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class HideTokens(Op):
    """logits[s, i] = -inf for the token ids i that stand for nothing and must never be drawn."""

    READS = ("logits",)
    WRITES = ("logits",)
    logits: Buffer
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sample(Op):
    """Draws the next token of each sampled row from its logits under its slot's parameters.

    The tokens stay on the device as the next input of their slots and are handed to the host.
    """

    READS = ("logits",)
    WRITES = ()
    logits: Buffer


@dataclass(frozen=True)
class Program:
    """A model as data: what to run, over which buffers, weights and caches."""

    architecture: str
    dtype: DType
    vocab_size: int
    max_position: int  # longest sequence the positions are defined for
    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    weights: tuple[Weight, ...]
    caches: tuple[KVCache, ...]
    notes: tuple[str, ...] = ()
    states: tuple[StateCache, ...] = ()

    def with_weights(self, change: Callable[[Weight], Weight]) -> Program:
        weights = {weight.name: change(weight) for weight in self.weights}

        def of(value: Any) -> Any:
            return weights[value.name] if isinstance(value, Weight) else value

        return replace(self, ops=tuple(op.mapped(of) for op in self.ops), weights=tuple(weights.values()))

    @property
    def ropes(self) -> list[Rope]:
        """The rotary tables its ops read, each once."""
        found = (op.rope for op in self.ops if isinstance(op, RopeKV | LatentRopeKV))
        return list(dict.fromkeys(rope for rope in found if rope is not None))

    @property
    def state_elements_per_slot(self) -> int:
        """Elements that a running sequence's recurrent layers carry."""
        return sum(s.elements for s in self.states)
