"""Causal attention over the paged cache: one query of one head at a time, its blocks in order of position.

A block's 16 keys lie side by side (see `rowwise.rope`), so the scores of a block are one vector and need no
sums across lanes. The order of every sum depends on the query's position and the window alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rvllm.backends.cpu.native.emit import F32, I32, I64, LANES, VF, Kernel, Value, Var
from rvllm.backends.cpu.native.mathematics import exp, tanh
from rvllm.backends.cpu.native.rowwise import BLOCK, POSITIONS, SEQUENCE, TABLE_WIDTH, TABLES, TOKENS

ATTENTION = (
    "step", "qkv", "qkv_width", "heads", "kv_heads", "dim", "padded_dim", "keys", "values", "out",
    "out_width", "scale", "window", "cap", "scratch", "scratch_size", "counter",
)  # fmt: skip
CHAINS = 4  # sums side by side


def attention(capped: bool) -> Callable[[Any, str], None]:
    """The kernel ATTENTION; window 0 is none."""

    def write(module: Any, name: str) -> None:
        k = Kernel(module, name)
        step, heads = k.ptr_arg(0), k.int_arg(3)
        with k.items(k.ptr_arg(16), k.load(step, TOKENS, I64) * heads) as item:
            _Query(k, step, item // heads, item % heads).attend(capped)
        k.finish()

    return write


class _Query:
    """Writes the attention of one query of one head."""

    def __init__(self, k: Kernel, step: Value, row: Value, head: Value) -> None:
        self.k, self.row, self.head = k, row, head
        self.heads, self.kv_heads, self.dim, self.padded = (k.int_arg(i) for i in (3, 4, 5, 6))
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
        self.scores = k.at(k.ptr_arg(14), k.thread * k.int_arg(15))

    def attend(self, capped: bool) -> None:
        """Scores, then weights, then the weighted sum of the values."""
        k = self.k
        top = self._score(capped)
        total = self._weigh(k.splat(k.fold(top, k.most)))
        chunks = self.padded // LANES
        done, count = k.i(0), CHAINS
        while count:
            whole = done + (chunks - done) // count * count
            with k.loop(done, whole, count) as chunk:
                self._mix(chunk * LANES, count, total)
            done, count = whole, count // 2

    def _block(self, base: Value, index: Value, size: Value) -> Value:
        """Where this head's part of the sequence's block `index` begins."""
        k = self.k
        block = k.extend(k.load(self.table, index, I32), I64, signed=True)
        return k.at(base, (block * self.kv_heads + self.kv_head) * size, F32)

    def _score(self, capped: bool) -> Value:
        """Scores of all blocks into scratch, out of sight -inf; the largest of each lane."""
        k = self.k
        query = k.at(k.ptr_arg(1), self.row * k.int_arg(2) + self.head * self.dim, F32)
        scale, cap = k.splat(k.float_arg(11)), k.splat(k.float_arg(13))
        top = k.var(k.vf(float("-inf")))
        even = self.dim // CHAINS * CHAINS
        with k.loop(self.first, self.end) as index:
            keys = self._block(k.ptr_arg(7), index, self.dim * BLOCK)
            sums = [k.var(k.vf(0.0)) for _ in range(CHAINS)]

            def multiply(sum_: Var, i: Value, keys: Value = keys) -> None:
                key = k.load(keys, i * BLOCK, VF)
                sum_.set(k.fma(key, k.splat(k.load(query, i, F32)), sum_.get()))

            with k.loop(0, even, CHAINS) as i:
                for n, sum_ in enumerate(sums):
                    multiply(sum_, i + n)
            with k.loop(even, self.dim) as i:
                multiply(sums[0], i)
            a, b, c, d = (s.get() for s in sums)
            score = ((a + b) + (c + d)) * scale
            if capped:
                score = tanh(k, score / cap) * cap
            at = k.splat(k.narrow(index * BLOCK, I32)) + k.lane_numbers()
            seen = (at <= k.splat(k.narrow(self.position, I32))) & (at >= k.splat(k.narrow(self.oldest, I32)))
            score = k.select(seen, score, k.vf(float("-inf")))
            k.store(score, self.scores, (index - self.first) * BLOCK)
            top.set(k.most(score, top.get()))
        return top.get()

    def _weigh(self, top: Value) -> Value:
        """Scores become weights e^(score - top); their sum."""
        k = self.k
        total = k.var(k.vf(0.0))
        with k.loop(0, self.end - self.first) as index:
            weight = exp(k, k.load(self.scores, index * BLOCK, VF) - top)
            k.store(weight, self.scores, index * BLOCK)
            total.set(total.get() + weight)
        return k.total(total.get())

    def _mix(self, start: Value, count: int, total: Value) -> None:
        """Elements start .. start + 16 * count - 1 of the output. What is out of sight is not touched."""
        k = self.k
        sums = [k.var(k.vf(0.0)) for _ in range(count)]
        with k.loop(self.first, self.end) as index:
            values = k.at(self._block(k.ptr_arg(8), index, self.padded * BLOCK), start, F32)
            low = k.most(self.oldest - index * BLOCK, k.i(0))
            high = k.least(self.position - index * BLOCK + 1, k.i(BLOCK))
            weights = k.at(self.scores, (index - self.first) * BLOCK, F32)
            with k.loop(low, high) as j:
                weight = k.splat(k.load(weights, j, F32))
                for n, sum_ in enumerate(sums):
                    value = k.load(values, j * self.padded + n * LANES, VF)
                    sum_.set(k.fma(weight, value, sum_.get()))
        out = k.at(k.ptr_arg(9), self.row * k.int_arg(10) + self.head * self.dim, F32)
        for n, sum_ in enumerate(sums):
            at = start + n * LANES
            k.masked_store(sum_.get() / k.splat(total), out, at, self.dim - at)
