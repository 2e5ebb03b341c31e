"""The reference: what each op computes, one pure function an op, reading like its formula.

Arrays are float32; T is the number of tokens. CUDA kernels are tested against these functions, and the
CPU backend runs them (with `product` and `paged_attention`, which compute `linear` and `attention` in
pieces of fixed shape).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rvllm.program.ops.dense import Activation

F32 = NDArray[np.float32]
Ints = NDArray[np.int32]


def embed(tokens: Ints, table: F32, scale: float = 1.0) -> F32:
    """table[tokens] * scale; [T], [vocab, width] → [T, width]."""
    out: F32 = table[tokens]
    return out if scale == 1.0 else out * np.float32(scale)


def rms_norm(x: F32, weight: F32 | None, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019)."""
    mean = np.vecdot(x, x)[..., None] / np.float32(x.shape[-1])  # a dot product a row: one order of sums
    out: F32 = x / np.sqrt(mean + np.float32(eps))
    return out if weight is None else out * weight


def layer_norm(x: F32, weight: F32 | None, bias: F32 | None, eps: float) -> F32:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al. 2016)."""
    width = np.float32(x.shape[-1])
    centred = x - np.vecdot(x, np.ones(x.shape[-1], np.float32))[..., None] / width
    variance = np.vecdot(centred, centred)[..., None] / width
    out: F32 = centred / np.sqrt(variance + np.float32(eps))
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def linear(x: F32, weight: F32, bias: F32 | None = None) -> F32:
    """x @ weight.T + bias; [T, K], [N, K] → [T, N]."""
    out: F32 = x @ weight.T
    return out if bias is None else out + bias


def rotate(x: F32, cos: F32, sin: F32, interleaved: bool = False) -> F32:
    """Rotates the first 2 * half elements of each head by its position's angles (Su et al. 2021).

    x [T, heads, dim]; cos, sin [T, half]. Pairs are (i, i + half), or (2i, 2i + 1) when interleaved.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = x.copy()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def attention(
    q: F32,
    k: F32,
    v: F32,
    start: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> F32:
    """Causal softmax(q k^T * scale) v of one sequence (Vaswani et al. 2017).

    q [Q, heads, dim] at positions start, start + 1, ...; k, v [start + Q, kv heads, dim] → [Q, heads, dim].
    """
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, keys) * np.float32(scale)
    if soft_cap is not None:
        scores = cap(scores, soft_cap)
    position = start + np.arange(len(q))[:, None]
    key = np.arange(len(k))[None, :]
    hidden = (key > position) | (key <= position - (window or len(k) + 1))
    scores = np.where(hidden, np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: F32 = np.einsum("hqk,khd->qhd", weights, values)
    return out


def cap(x: F32, limit: float) -> F32:
    """limit * tanh(x / limit)."""
    out: F32 = np.tanh(x / np.float32(limit)) * np.float32(limit)
    return out


def silu(x: F32) -> F32:
    """x / (1 + exp(-x)) (Elfwing et al. 2017)."""
    out = np.exp(-x)
    out += np.float32(1)
    return np.divide(x, out, out=out)


def erf(x: F32) -> F32:
    """The error function, within 3e-7, as a rational function of x^2 on [-4, 4]."""
    x = np.clip(x, np.float32(-4), np.float32(4))
    square = x * x
    over, under = _polynomial(ERF_OVER, square), _polynomial(ERF_UNDER, square)
    out: F32 = np.clip(x * over / under, np.float32(-1), np.float32(1))
    return out


def _polynomial(coefficients: tuple[float, ...], x: F32) -> F32:
    """The polynomial with these coefficients, highest power first (Horner)."""
    out = np.full(x.shape, coefficients[0], dtype=np.float32)
    for c in coefficients[1:]:
        out *= x
        out += np.float32(c)
    return out


# A minimax fit widely used for float32 (Eigen, XLA).
ERF_OVER = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
             -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
ERF_UNDER = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
              -1.42647390514189e-02)  # fmt: skip


def gelu(x: F32) -> F32:
    """x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel 2016)."""
    return x * np.float32(0.5) * (np.float32(1) + erf(x * np.float32(0.5**0.5)))


def gelu_tanh(x: F32) -> F32:
    """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, gelu's approximation."""
    inner = (x + x * x * x * np.float32(0.044715)) * np.float32(math.sqrt(2 / math.pi))
    tanh: F32 = np.tanh(inner)
    return x * np.float32(0.5) * (tanh + np.float32(1))


def relu(x: F32) -> F32:
    """max(x, 0)."""
    out: F32 = np.maximum(x, np.float32(0))
    return out


def relu2(x: F32) -> F32:
    """max(x, 0)^2 (So et al. 2021)."""
    return np.square(relu(x))


ACTIVATIONS: dict[Activation, Callable[[F32], F32]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
}


def activate(x: F32, activation: Activation) -> F32:
    """act(x)."""
    return ACTIVATIONS[activation](x)


def gated_activation(x: F32, activation: Activation) -> F32:
    """act(x[:, :width]) * x[:, width:]; [T, 2 * width] → [T, width] (Shazeer 2020)."""
    width = x.shape[-1] // 2
    out = activate(x[:, :width], activation)
    out *= x[:, width:]
    return out


def add(x: F32, y: F32, scale: float = 1.0) -> F32:
    """x + y * scale."""
    return x + (y if scale == 1.0 else y * np.float32(scale))


def logits(x: F32, weight: F32, bias: F32 | None, scale: float, soft_cap: float | None) -> F32:
    """cap(x @ weight.T * scale + bias); [S, K], [vocab, K] → [S, vocab]."""
    return finish_logits(x @ weight.T, bias, scale, soft_cap)


def finish_logits(out: F32, bias: F32 | None, scale: float, soft_cap: float | None) -> F32:
    """Scale, bias and cap on top of the product."""
    if scale != 1.0:
        out = out * np.float32(scale)
    if bias is not None:
        out = out + bias
    return out if soft_cap is None else cap(out, soft_cap)
