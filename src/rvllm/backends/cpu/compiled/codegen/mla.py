"""Latent attention: a token's one cached row, latent and rotated key, is key and value of all heads.

The cache is the interpreter's, [block][16 tokens][key dim], so there is one copy of it. The heads' own
matrices are `matmul.product` over chunks of one head each.
"""

from __future__ import annotations

from typing import Any

from rvllm.backends.cpu.compiled.codegen.attention import CHAINS, Query, pieces
from rvllm.backends.cpu.compiled.codegen.emit import F32, I64, VF, Kernel, Value, kernel
from rvllm.backends.cpu.compiled.codegen.rowwise import across, rotate
from rvllm.backends.cpu.compiled.slots import (
    BLOCK,
    BLOCK_ROWS,
    CHUNK,
    CHUNK_COUNT,
    CHUNK_FIRST,
    CHUNK_ROWS,
    HEADS_ACROSS,
    LANES,
    PLACES,
    POSITIONS,
    TOKENS,
)

LATENT_ROPE = (
    "step", "q", "heads", "head_dim", "kv", "key_dim", "half", "cos", "sin", "cache", "counter",
)  # fmt: skip
LATENT_ATTENTION = (
    "step", "q", "q_width", "heads", "kv_heads", "key_dim", "key_dim", "cache", "cache", "out", "out_width",
    "scale", "window", "cap", "scratch", "scratch_size", "rank", "counter",
)  # fmt: skip
BY_HEAD = ("rows", "heads", "order", "chunks", "counter")
TAILS = ("rows", "x", "x_width", "out", "out_width", "length", "counter")


@kernel
def latent_rope(k: Kernel, interleaved: bool) -> None:
    """Rotates the ends of the queries and of the shared key, and writes latent and key to the cache."""
    step, q, kv, cache = (k.ptr_arg(i) for i in (0, 1, 4, 9))
    heads, dim, key_dim, half = (k.int_arg(i) for i in (2, 3, 5, 6))
    positions, places = (k.load(step, slot, k.args.type) for slot in (POSITIONS, PLACES))
    with k.items(k.ptr_arg(10), k.load(step, TOKENS, I64)) as row:
        angle = k.load(positions, row, I64) * half
        turns = (half, k.at(k.ptr_arg(7), angle, F32), k.at(k.ptr_arg(8), angle, F32), interleaved)
        with k.loop(0, heads) as head:
            rotate(k, k.at(q, (row * heads + head + 1) * dim - half * 2, F32), *turns)
        line = k.at(kv, row * key_dim, F32)
        rotate(k, k.at(line, key_dim - half * 2, F32), *turns)
        target = k.at(cache, k.load(places, row, I64) * key_dim, F32)
        across(k, key_dim, lambda i, kind: k.store(k.load(line, i, kind), target, i))


@kernel
def latent_attention(k: Kernel) -> None:
    """The kernel LATENT_ATTENTION; HEADS_ACROSS heads of a row are an item, so they share what they read."""
    heads = k.int_arg(3)
    rows, groups = k.load(k.ptr_arg(0), TOKENS, I64), (heads + (HEADS_ACROSS - 1)) // HEADS_ACROSS
    with k.items(k.ptr_arg(17), rows * groups) as item:
        row, first = item // groups, item % groups * HEADS_ACROSS
        own = k.least(heads - first, k.i(HEADS_ACROSS))
        for count in range(HEADS_ACROSS, 0, -1):
            with k.when(own.equals(count)):
                _Latent(k, k.ptr_arg(0), row, first, count).attend(capped=False)


class _Latent(Query):
    """A query whose keys are rows, of which the first `rank` elements are the value."""

    def attend(self, capped: bool) -> None:
        self.value_dim = self.k.int_arg(16)
        self._weigh(self._score(capped))
        chunks = (self.value_dim + (LANES - 1)) // LANES
        for count in range(CHAINS, 0, -1):
            with pieces(self.k, chunks, CHAINS, count) as chunk:
                self._mix(chunk * LANES, count)

    def _score(self, capped: bool) -> list[Value]:
        k, lowest = self.k, self.k.vf(float("-inf"))
        queries = [k.at(k.ptr_arg(1), self.row * k.int_arg(2) + h * self.dim, F32) for h in self.mine]
        tops = [k.var(lowest) for _ in self.mine]
        scale = k.float_arg(11)
        with k.loop(self.first, self.end) as index:
            block = self._block(k.ptr_arg(7), index, self.dim * BLOCK)
            at = (index - self.first) * BLOCK
            for scores in self.scores:
                k.store(lowest, scores, at)
            with k.loop(0, k.least(self.position - index * BLOCK + 1, k.i(BLOCK))) as j:
                key = k.at(block, j * self.dim, F32)
                for scores, dot in zip(self.scores, self._dots(key, queries), strict=True):
                    k.store(dot * scale, scores, at + j)
            for scores, top in zip(self.scores, tops, strict=True):
                top.set(k.most(k.load(scores, at, VF), top.get()))
        return [top.get() for top in tops]

    def _dots(self, key: Value, queries: list[Value]) -> list[Value]:
        """The key times each query, lanes first, then what is behind the last whole vector."""
        k = self.k
        wholes, rests = [k.var(k.vf(0.0)) for _ in queries], [k.var(k.f(0.0)) for _ in queries]

        def multiply(index: Value, kind: Any) -> None:
            value = k.load(key, index, kind)
            for query, sum_ in zip(queries, wholes if kind == VF else rests, strict=True):
                sum_.set(k.fma(value, k.load(query, index, kind), sum_.get()))

        across(k, self.dim, multiply)
        return [k.total(whole.get()) + rest.get() for whole, rest in zip(wholes, rests, strict=True)]


@kernel
def by_head(k: Kernel) -> None:
    """Chunks of rows [token, head] that share a head; order[r] is row r's place, token * heads + head."""
    heads, order, chunks = k.int_arg(1), k.ptr_arg(2), k.ptr_arg(3)
    rows = k.load(k.ptr_arg(0), 0, I64)
    with k.items(k.ptr_arg(4), k.i(1)):
        cuts = (rows + (BLOCK_ROWS - 1)) // BLOCK_ROWS
        size = (rows + (cuts - 1)) // k.most(cuts, k.i(1))
        count = k.var(k.i(0))
        with k.loop(0, heads) as head, k.loop(0, rows, size) as start:
            at = count.get() * CHUNK + CHUNK_FIRST
            for i, value in enumerate((head, head * rows + start, k.least(size, rows - start))):
                k.store(value, chunks, at + i)
            count.set(count.get() + 1)
        k.store(count.get(), chunks, CHUNK_COUNT)
        k.store(rows * heads, chunks, CHUNK_ROWS)
        with k.loop(0, heads) as head, k.loop(0, rows) as row:
            k.store(row * heads + head, order, head * rows + row)


@kernel
def tails(k: Kernel) -> None:
    """The last `length` elements of each row of x into those of each row of out."""
    x, out, length = k.ptr_arg(1), k.ptr_arg(3), k.int_arg(5)
    with k.items(k.ptr_arg(6), k.load(k.ptr_arg(0), 0, I64)) as row:
        source = k.at(x, (row + 1) * k.int_arg(2) - length, F32)
        target = k.at(out, (row + 1) * k.int_arg(4) - length, F32)
        across(k, length, lambda i, kind: k.store(k.load(source, i, kind), target, i))
