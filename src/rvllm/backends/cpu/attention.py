"""Attention over the paged cache, with each query's sums in an order that depends on its position alone.

Keys are cut at fixed absolute positions into splits of SPLIT tokens. A query's scores against a split and
its weighted sum of the split's values are matrix products of one fixed shape ([group, dim] with
[dim, SPLIT] and back), whether the query decodes alone or stands in a prefill chunk; splits are then
added in order of position. A key that a query may not see contributes an exact zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu import ops
from rvllm.backends.cpu.step import BLOCK, Step
from rvllm.backends.cpu.threads import Workers

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

SPLIT = 128  # tokens
SPLIT_BLOCKS = SPLIT // BLOCK
QUERIES = 32  # queries of a prefill chunk that share their scores' memory
HIDDEN = np.float32(-np.inf)
ONES = np.ones(SPLIT, dtype=np.float32)


@dataclass(frozen=True)
class Scoring:
    """How scores are made: see the op Attention."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def first_split(self, position: int) -> int:
        """The split of the oldest key that a query at this position sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // SPLIT


def paged_attention(q: F32, keys: F32, values: F32, step: Step, scoring: Scoring, workers: Workers) -> F32:
    """q [T, heads, dim]; keys, values [blocks, BLOCK, kv heads, dim] → [T, heads, dim of values]."""
    rows, heads, _ = q.shape
    kv_heads = keys.shape[2]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, -1)
    out = np.empty((rows, heads, values.shape[3]), dtype=np.float32)
    target = out.reshape(rows, kv_heads, heads // kv_heads, -1)

    single = np.flatnonzero(step.query_lens == 1)
    if len(single):
        at = step.first_rows[single]
        query, tables, positions = grouped[at], step.tables[single], step.starts[single]

        def decode(low: int, high: int) -> None:
            part = slice(low, high)
            target[at[part]] = _decode(query[part], keys, values, tables[part], positions[part], scoring)

        if _spreads(workers, int(positions.sum()) * heads) and len(single) > 1:
            workers.split(len(single), decode)
        else:
            decode(0, len(single))

    for s in np.flatnonzero(step.query_lens > 1):
        first, count = int(step.first_rows[s]), int(step.query_lens[s])
        start = int(step.starts[s])
        low, high = scoring.first_split(start), (start + count - 1) // SPLIT + 1
        k, v = _gather(
            keys, values, step.tables[s, low * SPLIT_BLOCKS : high * SPLIT_BLOCKS], start + count, low
        )
        _run_chunks(
            [
                _prefill_task(grouped, target, k, v, first, start, i, min(count, i + QUERIES), low, scoring)
                for i in range(0, count, QUERIES)
            ],
            workers,
        )
    return out


def _spreads(workers: Workers, work: int) -> bool:
    return workers.count > 1 and work >= 1 << 14


def _run_chunks(tasks: list[Callable[[], None]], workers: Workers) -> None:
    """Gives every worker each n-th task, so that the growing cost of later queries is shared evenly."""

    def share(index: int) -> Callable[[], None]:
        def work() -> None:
            for task in tasks[index :: workers.count]:
                task()

        return work

    workers.run([share(i) for i in range(min(workers.count, len(tasks)))])


def _gather(keys: F32, values: F32, table: NDArray[np.int32], length: int, low: int) -> tuple[F32, F32]:
    """One sequence's keys and values as splits [n, SPLIT, kv heads, dim], zero beyond `length`."""
    k = keys[table].reshape(-1, SPLIT, *keys.shape[2:])
    v = values[table].reshape(-1, SPLIT, *values.shape[2:])
    k[-1, length - (low + len(k) - 1) * SPLIT :] = 0
    v[-1, length - (low + len(v) - 1) * SPLIT :] = 0
    return k, v


def _prefill_task(
    grouped: F32,
    target: F32,
    k: F32,
    v: F32,
    first: int,
    start: int,
    i: int,
    end: int,
    low: int,
    scoring: Scoring,
) -> Callable[[], None]:
    """Attends queries i .. end - 1 of a chunk; k and v begin at split `low`."""

    def work() -> None:
        positions = start + np.arange(i, end)
        oldest, newest = scoring.first_split(start + i), (start + end - 1) // SPLIT
        part = slice(oldest - low, newest + 1 - low)
        scores = np.matmul(grouped[first + i : first + end, None], k[None, part].transpose(0, 1, 3, 4, 2))
        at = np.arange(oldest * SPLIT, (newest + 1) * SPLIT).reshape(1, -1, SPLIT)
        _score(scores, at, positions[:, None, None], scoring)
        scores -= scores.max(axis=(1, 4), keepdims=True)
        np.exp(scores, out=scores)
        sums = np.vecdot(scores, ONES)
        mixed = np.matmul(scores, v[None, part].swapaxes(2, 3))
        total, weight = mixed[:, 0], sums[:, 0]
        for j in range(1, mixed.shape[1]):
            total += mixed[:, j]
            weight += sums[:, j]
        np.divide(total, weight[..., None], out=target[first + i : first + end])

    return work


def _decode(
    q: F32, keys: F32, values: F32, tables: NDArray[np.int32], positions: Ints, scoring: Scoring
) -> F32:
    """One query a sequence: q [S, kv heads, group, dim] → [S, kv heads, group, dim of values]."""
    oldest = np.array([scoring.first_split(int(p)) for p in positions])
    counts = positions // SPLIT - oldest + 1
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sequence = np.repeat(np.arange(len(q)), counts)
    split = np.arange(len(sequence)) - begins[sequence] + oldest[sequence]
    blocks = tables[sequence[:, None], split[:, None] * SPLIT_BLOCKS + np.arange(SPLIT_BLOCKS)]
    k = np.take(keys, blocks, axis=0).reshape(-1, SPLIT, *keys.shape[2:])
    v = np.take(values, blocks, axis=0).reshape(-1, SPLIT, *values.shape[2:])

    at = split[:, None] * SPLIT + np.arange(SPLIT)
    v[at > positions[sequence][:, None]] = (
        0  # another sequence's leftovers must not reach the sum, not even as nan
    )
    scores = np.matmul(q[sequence], k.transpose(0, 2, 3, 1))
    _score(scores, at, positions[sequence][:, None], scoring)
    top = np.maximum.reduceat(scores.max(axis=-1), begins, axis=0)
    scores -= top[sequence][..., None]
    np.exp(scores, out=scores)
    sums = np.vecdot(scores, ONES)
    mixed = np.matmul(scores, v.swapaxes(1, 2))
    total: F32 = mixed[begins]
    weight: F32 = sums[begins]
    for j in range(1, int(counts.max())):
        longer = np.flatnonzero(counts > j)
        total[longer] += mixed[begins[longer] + j]
        weight[longer] += sums[begins[longer] + j]
    total /= weight[..., None]
    return total


def _score(scores: F32, at: Ints, positions: Ints, scoring: Scoring) -> None:
    """Scales and caps scores [..., kv heads, group, SPLIT] in place and hides keys out of sight.

    at: positions of the keys [..., SPLIT]; positions: of the queries, broadcasting against it.
    """
    scores *= np.float32(scoring.scale)
    if scoring.soft_cap is not None:
        scores[...] = ops.cap(scores, scoring.soft_cap)
    hidden = at > positions
    if scoring.window is not None:
        hidden |= at <= positions - scoring.window
    if hidden.any():
        np.copyto(scores, HIDDEN, where=hidden[..., None, None, :])
