"""The ops that only encoders have: texts in, one vector each out.

A step holds whole texts; every token sees all tokens of its text, so there is nothing to cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rvllm.program.ops.dense import Buffer, Op, Program, Weight

Pooling = Literal["mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True)
class AddPositions(Op):
    """x[t] += positions[position(t) + offset] + kinds[0], in place (Devlin et al. 2019).

    positions [places, width]; kinds [kinds, width]: what a token's text is, here always the first.
    """

    READS = ("x",)
    WRITES = ("x",)
    WEIGHTS = ("positions", "kinds")
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
    WRITES = ("out",)
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

    READS = ("x",)
    WRITES = ("out",)
    x: Buffer
    out: Buffer
    how: Pooling
    normalise: bool


def embedding_size(program: Program) -> int | None:
    """Width of the vectors an encoder gives; None for a program that generates."""
    pools = [op for op in program.ops if isinstance(op, Pool)]
    return pools[-1].out.width if pools else None
