"""The ops of models that turn texts into vectors or classes: encoders, and decoders whose rows are pooled.

A step holds whole texts, so nothing is kept from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rvllm.program.ops.dense import Buffer, Op, Program, Weight

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True)
class AddPositions(Op):
    """x[t] += positions[position(t) + offset] + kinds[kind(t)], in place (Devlin et al. 2019).

    positions [places, width]; kinds [kinds, width]: 0 for a text alone and the first of a pair, 1 for the
    pair's second text.
    """

    WRITES = ("x",)
    x: Buffer
    positions: Weight
    kinds: Weight | None
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class TextAttention(Op):
    """softmax(q k^T * scale) v among all tokens of a text; no cache, no mask (Vaswani et al. 2017).

    qkv [T, 3 * heads * head_dim], ordered q, k, v; out [T, heads * head_dim].
    """

    READS = ("qkv",)
    qkv: Buffer
    out: Buffer
    heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Pool(Op):
    """One vector a text, float32: out [S, width] from x [T, width] (Reimers & Gurevych 2019).

    mean: of its tokens; cls: its first token's; last: its last token's. normalise: divided by its length
    max(|v|, 1e-12).
    """

    x: Buffer
    out: Buffer
    how: Pooling
    normalise: bool


@dataclass(frozen=True, kw_only=True)
class Classify(Op):
    """A classification head on pooled vectors: out = weight @ tanh(dense @ x + dense_bias) + bias, float32.

    x [S, K] and out [S, N] float32; dense [K, K], without it x itself; weight [N, K]. contrast: out is the
    second row's number less the first's, [S, 1]: log-odds of one token against another (as Qwen3-Reranker).
    dense_pools: the dense layer is part of a text's pooling: classes of single tokens come without (BERT's).
    tokens: the model was trained to give classes of tokens, and gives none of whole texts.
    One row a text is little work, so every backend computes it on the host.
    """

    x: Buffer
    out: Buffer
    dense: Weight | None = None
    dense_bias: Weight | None = None
    weight: Weight
    bias: Weight | None = None
    contrast: bool = False
    dense_pools: bool = False
    tokens: bool = False


def classifier(program: Program) -> Classify | None:
    """The program's classification head, which is its last op; None for programs without."""
    last = program.ops[-1] if program.ops else None
    return last if isinstance(last, Classify) else None


def embedding_size(program: Program) -> int | None:
    """Width of what comes back for a text, a vector or classes; None for a program that generates."""
    head = classifier(program)
    if head is not None:
        return head.out.width
    pools = [op for op in program.ops if isinstance(op, Pool)]
    return pools[-1].out.width if pools else None
