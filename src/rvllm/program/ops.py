"""The vocabulary of a model program: buffers, weights and ops.

A program is a flat list of ops over named buffers. Every backend runs the same list; what an op
computes is defined by its docstring and by the NumPy reference in `backends/cpu`. Ops are plain data:
no op knows a backend, a batch or a pointer.

Shapes: T is the number of tokens in the step's flat batch, S the number of rows whose logits are
wanted. All sequences of the step lie one behind the other in the T rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rvllm.program.dtypes import DType
from rvllm.program.rope import Rope

Rows = Literal["tokens", "samples"]


@dataclass(frozen=True)
class Buffer:
    """An activation of shape [T or S, width]; its memory is planned from its lifetime."""

    name: str
    rows: Rows
    width: int
    dtype: DType


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint that becomes consecutive rows (axis 0) of a packed weight.

    source: its name in Hugging Face's layout (a GGUF reader maps its own names to these).
    shape: as stored in the checkpoint.
    layout: how its rows are rearranged on the way in.
      plain         as they are
      transposed    [in, out] on disk, [out, in] wanted
      head_qkv      GPT-NeoX: rows ordered [head][q|k|v][dim], wanted [q|k|v][head][dim]
      grouped_qkv   Phi-3-small and kin: rows ordered [kv head][its queries, k, v][dim], wanted
                    [queries | k | v][head][dim]
    heads: head count for head_qkv, kv head count for grouped_qkv.
    head_dim: dim for grouped_qkv; the other layouts follow from heads.
    add: a constant added to every element (Gemma's norms store w, compute with 1 + w).
    alternatives: other names the same tensor goes by; the first one found is used.
    """

    source: str
    shape: tuple[int, ...]
    layout: Literal["plain", "transposed", "head_qkv", "grouped_qkv"] = "plain"
    heads: int = 0
    head_dim: int = 0
    add: float = 0.0
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weight:
    """A packed weight: parts stacked along axis 0 in order, then viewed as `shape`.

    role: matrix (multiplied with activations, stored in the model's dtype or its quantised form),
    table (looked up by row) or vector (norm weights and biases, small).
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    role: Literal["matrix", "table", "vector"]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class KVCache:
    """A paged cache of one attention layer: per token `heads * (key_dim + value_dim)` elements."""

    name: str
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # tokens a query may look back, itself included; None is all

    @property
    def elements_per_token(self) -> int:
        """Elements one token takes."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One step of a program. READS, WRITES and WEIGHTS name the fields that hold buffers and weights.

    A field may hold None where it is optional. A buffer in both READS and WRITES is updated in place.
    """

    name: str  # unique within the program: "layers.3.attn"
    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ()
    WEIGHTS: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """The op's type in lower case, as catalogs and listings name it."""
        return type(self).__name__.lower()

    def _buffers(self, fields: tuple[str, ...]) -> tuple[Buffer, ...]:
        return tuple(b for b in (getattr(self, f) for f in fields) if b is not None)

    @property
    def reads(self) -> tuple[Buffer, ...]:
        """Buffers read."""
        return self._buffers(self.READS)

    @property
    def writes(self) -> tuple[Buffer, ...]:
        """Buffers written."""
        return self._buffers(self.WRITES)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Weights read."""
        return tuple(w for w in (getattr(self, f) for f in self.WEIGHTS) if w is not None)


@dataclass(frozen=True, kw_only=True)
class Embed(Op):
    """out[t] = table[token[t]] * scale; table [vocab, width]."""

    WRITES = ("out",)
    WEIGHTS = ("table",)
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

    READS = ("x",)
    WRITES = ("out",)
    WEIGHTS = ("weight", "bias")
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

    READS = ("x",)
    WRITES = ("out",)
    WEIGHTS = ("weight", "bias")
    x: Buffer
    out: Buffer
    weight: Weight
    bias: Weight | None = None


@dataclass(frozen=True, kw_only=True)
class RopeKV(Op):
    """Rotates q and k of a fused QKV row, writes k and v into the paged cache, leaves q in place.

    qkv [T, (heads + 2 * kv_heads) * head_dim], ordered q, k, v. rope None rotates nothing.
    """

    READS = ("qkv",)
    WRITES = ("qkv",)
    qkv: Buffer
    cache: KVCache
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None


@dataclass(frozen=True, kw_only=True)
class Attention(Op):
    """Causal softmax(q k^T * scale) v over the paged cache; q is the first part of `qkv`.

    out [T, heads * head_dim]. Query head h reads kv head h // (heads / kv_heads). window: see KVCache.
    soft_cap: logits become cap * tanh(logits / cap) before the mask (Gemma 2).
    """

    READS = ("qkv",)
    WRITES = ("out",)
    qkv: Buffer
    out: Buffer
    cache: KVCache
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, kw_only=True)
class GatedActivation(Op):
    """out = act(x[:, :width]) * x[:, width:]; x [rows, 2 * width] (SwiGLU, GeGLU; Shazeer 2020)."""

    READS = ("x",)
    WRITES = ("out",)
    x: Buffer
    out: Buffer
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class Activate(Op):
    """out = act(x), elementwise."""

    READS = ("x",)
    WRITES = ("out",)
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

    READS = ("x",)
    WRITES = ("out",)
    x: Buffer
    out: Buffer


@dataclass(frozen=True, kw_only=True)
class Logits(Op):
    """out = cap(x @ weight.T * scale + bias) in float32; x [S, K], weight [vocab, K], out [S, vocab]."""

    READS = ("x",)
    WRITES = ("out",)
    WEIGHTS = ("weight", "bias")
    x: Buffer
    out: Buffer
    weight: Weight
    bias: Weight | None = None
    scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sample(Op):
    """Draws the next token of each sampled row from its logits under its slot's parameters.

    The tokens stay on the device as the next input of their slots and are handed to the host.
    """

    READS = ("logits",)
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
    notes: tuple[str, ...] = field(default=())

    @property
    def kv_elements_per_token(self) -> int:
        """Cache elements one token takes over all layers."""
        return sum(c.elements_per_token for c in self.caches)
