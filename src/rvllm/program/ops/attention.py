"""The ops that fill the paged cache and attend to it: keys and values, or latents that are both."""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.program.ops.base import Buffer, KVCache, Op, Weight
from rvllm.program.rope import Rope


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
    q: Buffer
    out: Buffer
    cache: KVCache
    heads: int
    rank: int
    scale: float
