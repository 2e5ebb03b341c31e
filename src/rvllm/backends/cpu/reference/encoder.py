"""Kernels of the encoders' ops: whole texts, each attending to itself.

A text's numbers do not depend on the texts beside it: its attention is made of matrix products whose
shapes are its own, and its rows are pooled one after the other.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.reference.run import Kernel, Run
from rvllm.backends.cpu.step import Step
from rvllm.backends.heads import classify
from rvllm.program.ops import encoder
from rvllm.program.ops.dense import Op

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

ROWS = "rows that were pooled"
SCORES = 1 << 17  # scores that a thread holds at a time, unless one text has more


def text_attention(qkv: F32, heads: int, scale: float) -> F32:
    """Attention in n texts of one length; qkv [n, L, 3 * heads * dim] → [n, L, heads * dim]."""
    count, length, _ = qkv.shape
    q, k, v = qkv.reshape(count, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = np.matmul(q, k.swapaxes(2, 3))
    scores *= np.float32(scale)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = np.vecdot(scores, np.ones(length, np.float32))
    mixed = np.matmul(scores, v)
    mixed /= total[..., None]
    return np.ascontiguousarray(mixed.transpose(0, 2, 1, 3)).reshape(count, length, -1)


def pool(x: F32, how: encoder.Pooling, normalise: bool) -> F32:
    """One text's vector [width] from its rows x [L, width]."""
    if how == "mean":
        out = np.add.reduce(x, axis=0, dtype=np.float64).astype(np.float32) / np.float32(len(x))
    elif how == "cls":
        out = x[0]
    elif how == "last":
        out = x[-1]
    else:
        assert_never(how)
    if normalise:
        out = out / max(np.sqrt(np.vecdot(out, out)), np.float32(1e-12))
    return np.asarray(out, dtype=np.float32)


def texts_by_length(step: Step, heads: int) -> list[Ints]:
    """Row numbers [n, L] of texts of equal length, in portions of about SCORES scores, long ones first."""
    found: list[Ints] = []
    for length in sorted(set(step.query_lens.tolist()), reverse=True):
        rows = step.first_rows[step.query_lens == length][:, None] + np.arange(length)
        portion = max(1, SCORES // (heads * length * length))
        found += [rows[i : i + portion] for i in range(0, len(rows), portion)]
    return found


def add_positions_op(op: encoder.AddPositions, run: Run) -> None:
    """Adds the position's and the text's own vector to each row."""
    x = run[op.x]
    x += run.model.weights[op.positions.name][run.step.positions + op.offset]
    kinds = run.weight(op.kinds)
    if kinds is not None:
        x += kinds[run.step.kinds] if len(kinds) > 1 else kinds[0]


def text_attention_op(op: encoder.TextAttention, run: Run) -> None:
    """Texts of equal length together, portions of them side by side."""
    qkv = run[op.qkv]
    out = np.empty((len(qkv), op.heads * op.head_dim), dtype=np.float32)
    portions = run.step.shared(("texts", op.heads), lambda: texts_by_length(run.step, op.heads))

    def work(index: int) -> None:
        rows = portions[index]
        out[rows] = text_attention(qkv[rows], op.heads, op.scale)

    run.model.workers.each(len(portions), work)
    run[op.out] = out


def pool_op(op: encoder.Pool, run: Run) -> None:
    """Pools each text's rows; the result stays in the run as `embeddings`, the rows as ROWS."""
    x, step = run[op.x], run.step
    run.buffers[ROWS] = x
    ends = step.first_rows + step.query_lens
    spans = zip(step.first_rows.tolist(), ends.tolist(), strict=True)
    run[op.out] = np.stack([pool(x[a:b], op.how, op.normalise) for a, b in spans])


def classify_op(op: encoder.Classify, run: Run) -> None:
    """The classes of each text's vector."""
    run[op.out] = classify(op, run[op.x], run.model.weights)


KERNELS: dict[type[Op], Kernel] = {
    encoder.AddPositions: add_positions_op,
    encoder.TextAttention: text_attention_op,
    encoder.Pool: pool_op,
    encoder.Classify: classify_op,
}
