"""Multi-head latent attention (DeepSeek-AI 2024): the cache holds one latent and one rotated key a token.

Prefill and decode both work on absorbed queries, so a token has the same bits whichever computed it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.attention import Pages, Scoring, paged_attention
from rvllm.backends.cpu.reference.gemm import product
from rvllm.backends.cpu.reference.run import Kernel, Run
from rvllm.backends.cpu.threads import Workers
from rvllm.program.ops import dense as program_ops
from rvllm.program.ops.dense import Op

F32 = NDArray[np.float32]


def head_linear(x: F32, weight: F32, workers: Workers) -> F32:
    """[T, heads, K + tail], [heads, N, K] → [T, heads, N + tail]; see the op HeadLinear."""
    _, wanted, inner = weight.shape
    out = np.empty((len(x), len(weight), wanted + x.shape[2] - inner), dtype=np.float32)
    for head, matrix in enumerate(weight):
        out[:, head, :wanted] = product(np.ascontiguousarray(x[:, head, :inner]), matrix, workers)
    out[:, :, wanted:] = x[:, :, inner:]
    return out


def rotate_last(x: F32, cos: F32, sin: F32, interleaved: bool) -> None:
    """Rotates the last 2 * half elements of each head in place; x [T, heads, dim], cos and sin [T, half]."""
    last = x[:, :, x.shape[2] - 2 * cos.shape[1] :]
    last[...] = ops.rotate(last, cos, sin, interleaved)


def rope_kv_op(op: program_ops.LatentRopeKV, run: Run) -> None:
    """Rotates queries and the shared key, and writes latent and key to their places in the cache."""
    q, kv, step = run[op.q], run[op.kv], run.step
    cos, sin = (table[step.positions] for table in run.model.ropes[op.rope])
    rotate_last(q.reshape(len(q), op.heads, op.head_dim), cos, sin, op.rope.interleaved)
    rotate_last(kv.reshape(len(kv), 1, -1), cos, sin, op.rope.interleaved)
    cache, _ = run.model.caches[op.cache.name]
    cache.reshape(-1, cache.shape[-1])[step.places] = kv


def head_linear_op(op: program_ops.HeadLinear, run: Run) -> None:
    weight = run.model.weights[op.weight.name]
    x = run[op.x].reshape(-1, len(weight), weight.shape[2] + op.tail)
    run[op.out] = head_linear(x, weight, run.model.workers).reshape(len(x), -1)


def attention_op(op: program_ops.LatentAttention, run: Run) -> None:
    """Attention whose values are the first `rank` elements of its keys."""
    q = run[op.q].reshape(-1, op.heads, op.cache.key_dim)
    cache, _ = run.model.caches[op.cache.name]
    pages = Pages(cache, None, op.rank)
    out = paged_attention(q, pages, run.step, Scoring(op.scale), run.model.workers)
    run[op.out] = out.reshape(len(q), -1)


KERNELS: dict[type[Op], Kernel] = {
    program_ops.LatentRopeKV: rope_kv_op,
    program_ops.HeadLinear: head_linear_op,
    program_ops.LatentAttention: attention_op,
}
