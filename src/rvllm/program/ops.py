"""The vocabulary of a model program: buffers, weights and ops.

A program is a flat list of ops over named buffers. Every backend runs the same list; what an op
computes is defined by its docstring and by the NumPy reference in `backends/cpu`. Ops are plain data:
no op knows a backend, a batch or a pointer.

Shapes: T is the number of tokens in the step's flat batch, S the number of rows whose logits are
wanted. All sequences of the step lie one behind the other in the T rows.
"""

from __future__ import annotations

import math
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
      pairs         rows ordered (gate, up), (gate, up), ..., wanted all gates, then all ups
      head_rows     rows ordered [head][row], wanted the rows `rows` = (first, count) of each head
      head_columns  the same, and each head's [count, K] transposed: [head][K][count]
      columns       of each row the elements `columns` = (first, count)
    heads: head count for head_qkv, head_rows and head_columns, kv head count for grouped_qkv.
    head_dim: dim for grouped_qkv; the other layouts follow from heads.
    add: a constant added to every element (Gemma's norms store w, compute with 1 + w).
    alternatives: other names the same tensor goes by; the first one found is used.
    prepared: the name of a tensor that some checkpoints hold instead, already laid out as wanted.
    """

    source: str
    shape: tuple[int, ...]
    layout: Literal[
        "plain", "transposed", "head_qkv", "grouped_qkv", "pairs", "head_rows", "head_columns", "columns"
    ] = "plain"
    heads: int = 0
    head_dim: int = 0
    add: float = 0.0
    alternatives: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 0)
    prepared: str = ""
    columns: tuple[int, int] = (0, 0)

    @property
    def elements(self) -> int:
        """Number of elements it becomes."""
        if self.layout == "columns":
            return math.prod(self.shape[:-1]) * self.columns[1]
        if self.layout in ("head_rows", "head_columns"):
            return self.heads * self.rows[1] * self.shape[-1]
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weight:
    """A packed weight: parts stacked along axis 0 in order, then viewed as `shape`.

    role: matrix (multiplied with activations, stored in the model's dtype or its quantised form), stack
    (several matrices of one shape, one an expert or a head: [E, N, K]), table (looked up by row) or vector
    (norm weights and biases, small).
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    role: Literal["matrix", "stack", "table", "vector"]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True)
class KVCache:
    """A paged cache of one attention layer: per token `heads * (key_dim + value_dim)` elements.

    value_dim 0: keys and values are one vector, the latent (see LatentAttention).
    """

    name: str
    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # tokens a query may look back, itself included; None is all

    @property
    def elements_per_token(self) -> int:
        """Elements one token takes."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class StateCache:
    """What one recurrent layer carries from token to token: `elements` float32 a slot, zero at its start.

    Unlike keys and values it is of one size however long the sequence is, and holds only its newest moment:
    a prefix's blocks alone do not let another sequence go on from there.
    """

    name: str
    elements: int


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


@dataclass(frozen=True)
class BlockSparsity:
    """Which blocks of keys a query sees: near ones, and every `stride`-th (Phi-3-small's published code).

    Positions are cut into blocks of `size`. Query head h at a position of block i sees the keys of block
    j <= i (up to its own position) where i - j < local, or (j + 1 + h * head_step) % stride == 0.
    """

    size: int
    local: int
    stride: int
    head_step: int  # 0: all heads see the same blocks


@dataclass(frozen=True, kw_only=True)
class BlockSparseAttention(Op):
    """As Attention, but a query sees only some blocks of keys; see BlockSparsity."""

    READS = ("qkv",)
    WRITES = ("out",)
    qkv: Buffer
    out: Buffer
    cache: KVCache
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    sparsity: BlockSparsity


@dataclass(frozen=True, kw_only=True)
class LatentRopeKV(Op):
    """Rotates the positional parts of MLA's queries and key, writes latent and key into the paged cache.

    q [T, heads * head_dim]: the last `rope.dim` elements of each head are rotated in place. kv
    [T, rank + rope.dim]: the latent and the one key that all heads share; the key is rotated, and both are
    written to the cache as they stand (DeepSeek-AI 2024, section 2.1). cache: one head, key_dim
    rank + rope.dim, value_dim 0.
    """

    READS = ("q", "kv")
    WRITES = ("q", "kv")
    q: Buffer
    kv: Buffer
    cache: KVCache
    heads: int
    head_dim: int
    rope: Rope


@dataclass(frozen=True, kw_only=True)
class HeadLinear(Op):
    """out[t, h] = weight[h] @ x[t, h][:K], followed by the rest of x[t, h]; weight [heads, N, K].

    x [T, heads * (K + tail)], out [T, heads * (N + tail)]. This is how MLA's key and value projections are
    absorbed: into the queries before attention (tail: their rotated part), and out of the mixed latents
    after it. Sums in float32.
    """

    READS = ("x",)
    WRITES = ("out",)
    WEIGHTS = ("weight",)
    x: Buffer
    out: Buffer
    weight: Weight
    tail: int = 0


@dataclass(frozen=True, kw_only=True)
class LatentAttention(Op):
    """Causal softmax(q c^T * scale) c[:rank] over cached latents c, which all heads share.

    q [T, heads * (rank + rotated)], absorbed (see HeadLinear): the key of head h at position s is
    [W_uk[h] latent_s; key_s], so q_nope @ (W_uk[h] latent_s) = (W_uk[h]^T q_nope) @ latent_s.
    out [T, heads * rank]: mixed latents, from which W_uv[h] makes the head's output.
    """

    READS = ("q",)
    WRITES = ("out",)
    q: Buffer
    out: Buffer
    cache: KVCache
    heads: int
    rank: int
    scale: float


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
class ClampedGate(Op):
    """out = g * sigmoid(alpha * g) * (u + 1): Phi-3-small's gegelu, built on the quick GELU (alpha 1.702).

    g = min(x[:, :width], limit), u = x[:, width:] clamped to [-limit, limit]; x [rows, 2 * width].
    limit None clamps nothing.
    """

    READS = ("x",)
    WRITES = ("out",)
    x: Buffer
    out: Buffer
    limit: float | None
    alpha: float = 1.702


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
class Route(Op):
    """Chooses `top_k` of E experts for every token: ids int32 and shares float32, both [T, top_k + always].

    s = softmax(x @ weight.T) over the E experts, or its sigmoid, in float32; weight [E, K].
    c = s + bias, the score by which experts are chosen; it does not enter the shares (DeepSeek-AI 2024b).
    Experts are cut into `groups` of equal size and only those of the `kept_groups` best take part: a group
    is worth its largest c, or with group_score "top2" the sum of its two largest.
    ids are the top_k with the largest c, in descending order; of equals the lower id comes first.
    shares[t, j] = s[t, ids[t, j]], divided by their sum (+ 1e-20) if `renormalise`, times `scale`.
    Behind the chosen ones come the experts that every token has, E, E + 1, ..., each with share 1.
    """

    READS = ("x",)
    WRITES = ("shares", "ids")
    WEIGHTS = ("weight", "bias")
    x: Buffer
    ids: Buffer
    shares: Buffer
    weight: Weight
    bias: Weight | None = None
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    renormalise: bool = False
    scale: float = 1.0
    always: int = 0


@dataclass(frozen=True, kw_only=True)
class Experts(Op):
    """out[t] = sum over j of shares[t, j] * down[e] @ a, e = ids[t, j], in order of j (Shazeer et al. 2017).

    a = act(g) * u with [g; u] = up[e] @ x[t] where gated, else act(up[e] @ x[t]). x [T, K]; ids, shares
    [T, k] as Route writes them; up [E, 2 * width or width, K]; down [E, N, width]; out [T, N]. Only the
    experts that some token chose are read. always: the last so many experts are every token's (see Route).
    """

    READS = ("x", "ids", "shares")
    WRITES = ("out",)
    WEIGHTS = ("up", "down")
    x: Buffer
    ids: Buffer
    shares: Buffer
    out: Buffer
    up: Weight
    down: Weight
    activation: Activation
    gated: bool = True
    always: int = 0


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
    states: tuple[StateCache, ...] = field(default=())

    @property
    def kv_elements_per_token(self) -> int:
        """Cache elements one token takes over all layers."""
        return sum(c.elements_per_token for c in self.caches)

    @property
    def state_elements_per_slot(self) -> int:
        """Elements that a running sequence's recurrent layers carry."""
        return sum(s.elements for s in self.states)
