"""Attention over the paged cache, with each query's sums in an order that depends on its position alone.

Keys are cut at fixed absolute positions into splits of SPLIT tokens. A query's scores against a split and
its weighted sum of the split's values are matrix products of one fixed shape ([group, dim] with
[dim, SPLIT] and back), whether the query decodes alone or stands in a prefill chunk; splits are then
added in order of position. A key that a query may not see contributes an exact zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.base import KV_BLOCK
from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.fp8_cache import loaded
from rvllm.backends.cpu.step import Step
from rvllm.backends.cpu.threads import Workers
from rvllm.program.ops.dense import BlockSparsity

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

SPLIT = 128  # tokens
SPLIT_BLOCKS = SPLIT // KV_BLOCK
QUERIES = 32  # queries of a prefill chunk that share their scores' memory
HIDDEN = np.float32(-np.inf)
ONES = np.ones(SPLIT, dtype=np.float32)


@dataclass(frozen=True)
class Scoring:
    """How scores are made: see the ops Attention and BlockSparseAttention.

    groups: kv heads and query heads of each, which sparsity tells apart.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sparsity: BlockSparsity | None = None
    groups: tuple[int, int] = (1, 1)

    def first_splits(self, positions: Ints) -> Ints:
        """The split of the oldest key that a query at each of these positions sees."""
        if self.window is None:
            return np.zeros_like(positions)
        return np.maximum(0, positions - self.window + 1) // SPLIT

    def hidden(self, at: Ints, positions: Ints) -> NDArray[np.bool_]:
        """Whether the keys at `at` [..., SPLIT] are out of sight of the queries at `positions` [..., 1].

        [..., kv heads, group, SPLIT], the two in the middle 1 where all heads see the same.
        """
        out: NDArray[np.bool_] = at > positions
        if self.window is not None:
            out = out | (at <= positions - self.window)
        if self.sparsity is None:
            return out[..., None, None, :]
        block = at // self.sparsity.size
        near = positions // self.sparsity.size - block < self.sparsity.local
        head = np.arange(self.groups[0] * self.groups[1]).reshape(*self.groups, 1)
        strided = (block[..., None, None, :] + 1 + head * self.sparsity.head_step) % self.sparsity.stride == 0
        unseen: NDArray[np.bool_] = ~(near[..., None, None, :] | strided)
        return out[..., None, None, :] | unseen

    def cap(self, scores: F32) -> None:
        """Caps scores in place."""
        if self.soft_cap is not None:
            scores[...] = ops.cap(scores, self.soft_cap)


@dataclass(frozen=True)
class Pages:
    """A layer's cache: keys and values [blocks, KV_BLOCK, kv heads, dim], or their bytes (see `fp8_cache`).

    values None: a token's value is the first `rank` elements of its key; see the op LatentAttention.
    """

    keys: NDArray[Any]
    values: NDArray[Any] | None
    rank: int = 0

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        if self.values is None:
            return self.rank
        dim: int = self.values.shape[3]
        return dim - 1 if self.values.dtype == np.uint8 else dim

    def take(self, table: NDArray[np.int32]) -> tuple[F32, F32]:
        """Keys and values [splits, SPLIT, kv heads, dim] of whole splits of blocks."""
        k = _taken(self.keys, table)
        return k, k[..., : self.rank] if self.values is None else _taken(self.values, table)


def _taken(cache: NDArray[Any], table: NDArray[np.int32]) -> F32:
    found = np.take(cache, table, axis=0).reshape(-1, SPLIT, *cache.shape[2:])
    return loaded(found) if cache.dtype == np.uint8 else found


@dataclass(frozen=True)
class Decodes:
    """Sequences with one query each, as a list of (sequence, split) items that every layer shares.

    rows: [S] their rows. begins, counts: [S] each sequence's first item and number of items.
    sequence: [I] the item's place in `rows`. blocks: [I, SPLIT_BLOCKS]. hidden: [I, ., ., SPLIT].
    longer: for j = 1, 2, ...: the sequences with more than j items.
    """

    rows: Ints
    begins: Ints
    sequence: Ints
    blocks: NDArray[np.int32]
    hidden: NDArray[np.bool_]
    longer: list[Ints]

    @staticmethod
    def of(step: Step, which: Ints, scoring: Scoring) -> Decodes:
        """The items of the sequences `which` of a step."""
        positions = step.starts[which]
        oldest = scoring.first_splits(positions)
        counts = positions // SPLIT - oldest + 1
        begins = np.cumsum(counts) - counts
        sequence = np.repeat(np.arange(len(which)), counts)
        split = np.arange(len(sequence)) - begins[sequence] + oldest[sequence]
        columns = split[:, None] * SPLIT_BLOCKS + np.arange(SPLIT_BLOCKS)
        at = split[:, None] * SPLIT + np.arange(SPLIT)
        return Decodes(
            rows=step.first_rows[which],
            begins=begins,
            sequence=sequence,
            blocks=step.tables[which[sequence][:, None], columns],
            hidden=scoring.hidden(at, positions[sequence][:, None]),
            longer=[np.flatnonzero(counts > j) for j in range(1, int(counts.max()))],
        )


def paged_attention(q: F32, pages: Pages, step: Step, scoring: Scoring, workers: Workers) -> F32:
    """q [T, heads, dim] → [T, heads, dim of values].

    Every place of the cache that a table names must hold finite numbers or the sequence's own.
    """
    rows, heads, _ = q.shape
    kv_heads = pages.keys.shape[2]
    grouped = (q * np.float32(scoring.scale)).reshape(rows, kv_heads, heads // kv_heads, -1)
    out = np.empty((rows, heads, pages.value_dim), dtype=np.float32)
    target = out.reshape(rows, kv_heads, heads // kv_heads, -1)

    single = np.flatnonzero(step.query_lens == 1)
    if len(single):
        worth_it = len(single) >= workers.count and int(step.starts[single].sum()) * heads >= 1 << 12
        parts = workers.count if worth_it else 1
        shares = step.shared(
            ("decodes", scoring.window, scoring.sparsity, parts),
            lambda: [Decodes.of(step, part, scoring) for part in np.array_split(single, parts)],
        )
        workers.each(parts, lambda i: _decode(shares[i], grouped, target, pages, scoring))

    for s in np.flatnonzero(step.query_lens > 1):
        first, count, start = int(step.first_rows[s]), int(step.query_lens[s]), int(step.starts[s])
        low, high = int(scoring.first_splits(step.starts[s])), (start + count - 1) // SPLIT + 1
        table = step.tables[s, low * SPLIT_BLOCKS : high * SPLIT_BLOCKS]
        k, v = pages.take(table)
        own = slice(first, first + count)
        chunk = Chunk(grouped[own], target[own], k, v, start, low, scoring)
        workers.each(-(-count // QUERIES), chunk.attend)
    return out


@dataclass(frozen=True)
class Chunk:
    """A run of queries of one sequence, with its keys and values from split `low` on.

    q, out: [Q, kv heads, group, dim]; k, v: [splits, SPLIT, kv heads, dim]; start: the first position.
    """

    q: F32
    out: F32
    k: F32
    v: F32
    start: int
    low: int
    scoring: Scoring

    def attend(self, item: int) -> None:
        """Attends the item-th QUERIES queries, counted from the end: those that see most come first."""
        end = len(self.q) - item * QUERIES
        begin = max(0, end - QUERIES)
        positions = self.start + np.arange(begin, end)
        oldest = int(self.scoring.first_splits(positions[:1])[0])
        newest = (self.start + end - 1) // SPLIT
        part = slice(oldest - self.low, newest + 1 - self.low)
        scores = np.matmul(self.q[begin:end, None], self.k[None, part].transpose(0, 1, 3, 4, 2))
        self.scoring.cap(scores)
        for i, split in enumerate(range(oldest, newest + 1)):
            at = np.arange(split * SPLIT, (split + 1) * SPLIT)
            hidden = self.scoring.hidden(at, positions[:, None])
            if hidden.any():
                np.copyto(scores[:, i], HIDDEN, where=hidden)
        scores -= scores.max(axis=4).max(axis=1)[:, None, :, :, None]
        np.exp(scores, out=scores)
        sums = np.vecdot(scores, ONES)
        mixed = np.matmul(scores, self.v[None, part].swapaxes(2, 3))
        total, weight = mixed[:, 0], sums[:, 0]
        for j in range(1, mixed.shape[1]):
            total += mixed[:, j]
            weight += sums[:, j]
        np.divide(total, weight[..., None], out=self.out[begin:end])


def _decode(share: Decodes, grouped: F32, target: F32, pages: Pages, scoring: Scoring) -> None:
    """Attends one query of each of the share's sequences."""
    k, v = pages.take(share.blocks)
    scores = np.matmul(grouped[share.rows[share.sequence]], k.transpose(0, 2, 3, 1))
    scoring.cap(scores)
    np.copyto(scores, HIDDEN, where=share.hidden)
    top = np.maximum.reduceat(scores.max(axis=-1), share.begins, axis=0)
    scores -= top[share.sequence][..., None]
    np.exp(scores, out=scores)
    sums = np.vecdot(scores, ONES)
    mixed = np.matmul(scores, v.swapaxes(1, 2))
    total, weight = mixed[share.begins], sums[share.begins]
    for j, longer in enumerate(share.longer, start=1):
        total[longer] += mixed[share.begins[longer] + j]
        weight[longer] += sums[share.begins[longer] + j]
    target[share.rows] = total / weight[..., None]
