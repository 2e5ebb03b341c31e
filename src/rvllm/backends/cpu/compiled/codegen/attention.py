"""Causal attention over the paged cache: a query of a few heads at a time, its blocks in order of position.

A block's 16 keys lie side by side (see `rowwise.rope`), so the scores of a block are one vector and need no
sums across lanes. The order of every sum depends on the query's position and the window alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from rvllm.backends.cpu.compiled.codegen.emit import F32, I32, I64, VF, Kernel, Value, Var, kernel
from rvllm.backends.cpu.compiled.codegen.mathematics import exp, tanh
from rvllm.backends.cpu.compiled.slots import (
    BLOCK,
    HEADS_ACROSS,
    LANES,
    POSITIONS,
    SEQUENCE,
    TABLE_WIDTH,
    TABLES,
    TOKENS,
)

ATTENTION = (
    "step", "qkv", "qkv_width", "heads", "kv_heads", "dim", "padded_dim", "keys", "values", "out",
    "out_width", "scale", "window", "cap", "scratch", "scratch_size", "counter",
)  # fmt: skip
CHAINS = 4  # sums side by side
FEW = 4  # rows for each thread below which heads are computed one by one


@kernel
def attention(k: Kernel, capped: bool) -> None:
    """The kernel ATTENTION; window 0 is none.

    Heads that share a key head are computed side by side, HEADS_ACROSS and then what is left, so that keys
    and values are loaded once for them; with few rows (decode) one by one, so that all threads find work.
    Neither changes a head's sums.
    """
    step, heads, kv_heads = k.ptr_arg(0), k.int_arg(3), k.int_arg(4)
    rows = k.load(step, TOKENS, I64)
    few = rows < k.threads * FEW
    items, own = k.select(few, heads, kv_heads), k.select(few, k.i(1), heads // kv_heads)
    with k.items(k.ptr_arg(16), rows * items) as item:
        row, first = item // items, item % items * own
        for count in range(HEADS_ACROSS, 0, -1):
            with pieces(k, own, HEADS_ACROSS, count) as head:
                Query(k, step, row, first + head, count).attend(capped)


def pieces(k: Kernel, length: Value, longest: int, count: int) -> AbstractContextManager[Value]:
    """Where pieces of `count` begin when `length` is cut into pieces of `longest` and a rest: 7 is 4, 3."""
    whole = length // longest * longest
    if count == longest:
        return k.loop(0, whole, longest)
    rest = k.select((length - whole).equals(count), k.i(1), k.i(0))
    return k.loop(whole, whole + rest)


class Query:
    """Writes the attention of one query of `count` heads, from `head` on, that share a key head."""

    def __init__(self, k: Kernel, step: Value, row: Value, head: Value, count: int) -> None:
        self.k, self.row, self.count = k, row, count
        self.heads, self.kv_heads, self.dim, self.padded = (k.int_arg(i) for i in (3, 4, 5, 6))
        self.value_dim = self.dim
        self.mine = [head + n for n in range(count)]
        self.kv_head = head // (self.heads // self.kv_heads)
        positions, tables, sequence = (
            k.load(step, slot, k.args.type) for slot in (POSITIONS, TABLES, SEQUENCE)
        )
        self.position = k.load(positions, row, I64)
        self.table = k.at(tables, k.load(sequence, row, I64) * k.load(step, TABLE_WIDTH, I64), I32)
        window = k.int_arg(12)
        oldest = k.most(self.position - window + 1, k.i(0))
        self.oldest = k.select(window > 0, oldest, k.i(0))
        self.first, self.end = self.oldest // BLOCK, self.position // BLOCK + 1
        self.scratch, self.size = k.at(k.ptr_arg(14), k.thread * k.int_arg(15)), k.int_arg(15) // HEADS_ACROSS
        self.scores = [k.at(self.scratch, self.size * n + LANES * 4) for n in range(count)]

    def attend(self, capped: bool) -> None:
        """Scores, then weights, then the weighted sum of the values."""
        self._weigh(self._score(capped))
        chunks = self.padded // LANES
        for count in range(CHAINS, 0, -1):
            with pieces(self.k, chunks, CHAINS, count) as chunk:
                self._mix(chunk * LANES, count)

    def _block(self, base: Value, index: Value, size: Value) -> Value:
        """Where this head's part of the sequence's block `index` begins."""
        k = self.k
        block = k.extend(k.load(self.table, index, I32), I64, signed=True)
        return k.at(base, (block * self.kv_heads + self.kv_head) * size, F32)

    def _score(self, capped: bool) -> list[Value]:
        """Scores of all blocks into scratch, out of sight -inf; the largest of each lane, for each head."""
        k = self.k
        queries = [k.at(k.ptr_arg(1), self.row * k.int_arg(2) + h * self.dim, F32) for h in self.mine]
        scale, cap = k.splat(k.float_arg(11)), k.splat(k.float_arg(13))
        tops = [k.var(k.vf(float("-inf"))) for _ in self.mine]
        even = self.dim // CHAINS * CHAINS
        with k.loop(self.first, self.end) as index:
            keys = self._block(k.ptr_arg(7), index, self.dim * BLOCK)
            sums = [[k.var(k.vf(0.0)) for _ in range(CHAINS)] for _ in self.mine]

            def multiply(chain: int, i: Value, keys: Value = keys, sums: list[list[Var]] = sums) -> None:
                key = k.load(keys, i * BLOCK, VF)
                for query, chains in zip(queries, sums, strict=True):
                    sum_ = chains[chain]
                    sum_.set(k.fma(key, k.splat(k.load(query, i, F32)), sum_.get()))

            with k.loop(0, even, CHAINS) as i:
                for n in range(CHAINS):
                    multiply(n, i + n)
            with k.loop(even, self.dim) as i:
                multiply(0, i)
            at = k.splat(k.narrow(index * BLOCK, I32)) + k.lane_numbers()
            seen = (at <= k.splat(k.narrow(self.position, I32))) & (at >= k.splat(k.narrow(self.oldest, I32)))
            for chains, scores, top in zip(sums, self.scores, tops, strict=True):
                a, b, c, d = (s.get() for s in chains)
                score = ((a + b) + (c + d)) * scale
                if capped:
                    score = tanh(k, score / cap) * cap
                score = k.select(seen, score, k.vf(float("-inf")))
                k.store(score, scores, (index - self.first) * BLOCK)
                top.set(k.most(score, top.get()))
        return [top.get() for top in tops]

    def _weigh(self, tops: list[Value]) -> None:
        """Scores become weights e^(score - top); each head's sum goes before its weights."""
        k = self.k
        for scores, top in zip(self.scores, tops, strict=True):
            k.store(k.splat(k.fold(top, k.most)), scores, -LANES)
        with k.loop(0, self.count) as n:  # not side by side: the exponential is long to compile
            scores, total = k.at(self.scratch, self.size * n), k.var(k.vf(0.0))
            top = k.load(scores, 0, VF)
            with k.loop(1, self.end - self.first + 1) as index:
                weight = exp(k, k.load(scores, index * BLOCK, VF) - top)
                k.store(weight, scores, index * BLOCK)
                total.set(total.get() + weight)
            k.store(k.splat(k.total(total.get())), scores, 0)

    def _mix(self, start: Value, count: int) -> None:
        """Elements start .. start + 16 * count - 1 of the output. What is out of sight is not touched."""
        k = self.k
        sums = [[k.var(k.vf(0.0)) for _ in range(count)] for _ in self.mine]
        with k.loop(self.first, self.end) as index:
            values = k.at(self._block(k.ptr_arg(8), index, self.padded * BLOCK), start, F32)
            low = k.most(self.oldest - index * BLOCK, k.i(0))
            high = k.least(self.position - index * BLOCK + 1, k.i(BLOCK))
            weights = [k.at(s, (index - self.first) * BLOCK, F32) for s in self.scores]
            with k.loop(low, high) as j:
                row = [k.load(values, j * self.padded + n * LANES, VF) for n in range(count)]
                for chunks, own in zip(sums, weights, strict=True):
                    weight = k.splat(k.load(own, j, F32))
                    for value, sum_ in zip(row, chunks, strict=True):
                        sum_.set(k.fma(weight, value, sum_.get()))
        for head, chunks, scores in zip(self.mine, sums, self.scores, strict=True):
            total = k.load(scores, -LANES, VF)
            out = k.at(k.ptr_arg(9), self.row * k.int_arg(10) + head * self.value_dim, F32)
            for n, sum_ in enumerate(chunks):
                at = start + n * LANES
                k.masked_store(sum_.get() / total, out, at, self.value_dim - at)
