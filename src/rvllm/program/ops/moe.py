"""The ops of mixtures of experts: which experts a token has, and what they make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rvllm.program.ops.base import Activation, Buffer, Op, Weight


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

    WRITES = ("shares", "ids")
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
    x: Buffer
    ids: Buffer
    shares: Buffer
    out: Buffer
    up: Weight
    down: Weight
    activation: Activation
    gated: bool = True
    always: int = 0
