"""The ops of Mamba-2 layers (Dao & Gu 2024): a short convolution, a state that decays, a gated norm.

A sequence at position 0 begins with nothing: whatever its slot's state holds counts as zero there.
"""

from __future__ import annotations

from dataclasses import dataclass

from rvllm.program.ops.base import Activation, Buffer, Op, StateCache, Weight

CHUNK = 16  # tokens whose sums belong together; chunks begin at multiples of it


@dataclass(frozen=True, kw_only=True)
class CausalConv(Op):
    """out[t, c] = act(bias[c] + sum over j of weight[c, j] * x[t - kernel + 1 + j, start + c]).

    A convolution of each channel by itself over the sequence's own tokens, zero before its first. x [T, any],
    weight [width, kernel], out [T, width]. state: the last kernel - 1 inputs, [kernel - 1, width].
    """

    x: Buffer
    out: Buffer
    weight: Weight
    bias: Weight | None
    state: StateCache
    start: int
    activation: Activation

    @staticmethod
    def elements(width: int, kernel: int) -> int:
        return (kernel - 1) * width


@dataclass(frozen=True, kw_only=True)
class StateScan(Op):
    """y_t = h_t C_t + d * x_t for every head, with h_t = exp(s_t a) h_(t-1) + s_t x_t B_t^T.

    xbc [T, heads * dim + 2 * groups * size]: x [heads, dim], B and C [groups, size]; head h uses group
    h // (heads / groups). s_t = max(softplus(steps[t, first + h] + bias[h]), floor), a = -exp(log_decay[h]).
    h_t [dim, size] a head, in float32. out [T, heads * dim].

    How it is summed: from the state at the start of the token's chunk, and the chunk's tokens up to it
    (the paper's section 6, chunks of CHUNK tokens at fixed positions). So a token's sums do not depend on the
    pieces in which its sequence was computed. state: h at the start of the newest chunk [heads, dim, size],
    then what is known of that chunk: xbc and steps [CHUNK, width + heads].
    """

    READS = ("xbc", "steps")
    xbc: Buffer
    steps: Buffer
    out: Buffer
    log_decay: Weight
    skip: Weight
    bias: Weight
    state: StateCache
    first: int
    heads: int
    dim: int
    groups: int
    size: int
    floor: float

    @staticmethod
    def elements(heads: int, dim: int, groups: int, size: int) -> int:
        return heads * dim * size + CHUNK * (heads * dim + 2 * groups * size + heads)


@dataclass(frozen=True, kw_only=True)
class GatedNorm(Op):
    """RMSNorm of each group of x * silu(gate), times weight; gate is the first columns of its buffer.

    x, out [T, width], weight [width], `group` elements a group; in float32.
    """

    READS = ("x", "gate")
    x: Buffer
    gate: Buffer
    out: Buffer
    weight: Weight
    group: int
    eps: float
