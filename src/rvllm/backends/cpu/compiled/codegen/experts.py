"""Mixtures of experts: which experts a token has, whose rows stand where, and the sum of what they give.

The experts' own products are `matmul.product` over the chunks that `assign` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from rvllm.backends.cpu.compiled.codegen.emit import F32, I32, I64, VF, Kernel, Value, kernel
from rvllm.backends.cpu.compiled.codegen.mathematics import exp
from rvllm.backends.cpu.compiled.codegen.rowwise import across, total
from rvllm.backends.cpu.compiled.slots import (
    BLOCK_ROWS,
    CHUNK,
    CHUNK_COUNT,
    CHUNK_FIRST,
    CHUNK_ROWS,
)

ROUTE = (
    "rows", "logits", "experts", "bias", "top_k", "groups", "kept", "top2", "renormalise", "scale", "always",
    "ids", "shares", "scratch", "scratch_size", "counter",
)  # fmt: skip
ASSIGN = (
    "rows", "ids", "chosen", "experts", "places", "sources", "targets", "chunks", "counter",
)  # fmt: skip
COMBINE = ("rows", "x", "shares", "chosen", "out", "width", "counter")
TINY = 1e-20  # beside the sum that shares are divided by


@kernel
def route(k: Kernel, scores: Literal["softmax", "sigmoid"]) -> None:
    """See the op Route; logits float32 [rows, experts]. Numbers that are none choose expert 0."""
    experts, top_k, always = k.int_arg(2), k.int_arg(4), k.int_arg(10)
    own = k.at(k.ptr_arg(13), k.thread * k.int_arg(14))
    choice = k.at(own, experts, F32)
    with k.items(k.ptr_arg(15), k.load(k.ptr_arg(0), 0, I64)) as row:
        logits = k.at(k.ptr_arg(1), row * experts, F32)
        place = row * (top_k + always)
        ids, shares = k.at(k.ptr_arg(11), place, I32), k.at(k.ptr_arg(12), place, F32)
        _SCORES[scores](k, logits, own, experts)
        across(k, experts, lambda i, t: k.store(k.load(own, i, t) + k.load(k.ptr_arg(3), i, t), choice, i))
        with k.when(k.int_arg(6) < k.int_arg(5)):
            _keep_groups(k, choice, experts // k.int_arg(5))
        _choose(k, own, choice, ids, shares)
        with k.loop(0, always) as i:
            k.store(k.narrow(experts + i, I32), ids, top_k + i)
            k.store(k.f(1.0), shares, top_k + i)


def _softmax(k: Kernel, logits: Value, out: Value, experts: Value) -> None:
    top = k.var(k.f(float("-inf")))
    with k.loop(0, experts) as i:
        top.set(k.most(k.load(logits, i, F32), top.get()))

    def power(index: Value, kind: Any) -> Value:
        largest = k.splat(top.get()) if kind == VF else top.get()
        value = exp(k, k.load(logits, index, kind) - largest)
        k.store(value, out, index)
        return value

    sum_ = total(k, experts, power)
    across(k, experts, lambda i, t: k.store(k.load(out, i, t) / (k.splat(sum_) if t == VF else sum_), out, i))


def _sigmoid(k: Kernel, logits: Value, out: Value, experts: Value) -> None:
    def one(index: Value, kind: Any) -> None:
        unit, none = (k.vf(1.0), k.vf(0.0)) if kind == VF else (k.f(1.0), k.f(0.0))
        k.store(unit / (unit + exp(k, none - k.load(logits, index, kind))), out, index)

    across(k, experts, one)


_SCORES: dict[str, Callable[[Kernel, Value, Value, Value], None]] = {"softmax": _softmax, "sigmoid": _sigmoid}


def _keep_groups(k: Kernel, choice: Value, size: Value) -> None:
    """-inf in all of `choice` but the best groups: those that fewer than `kept` others are better than."""
    groups, kept, lowest = k.int_arg(5), k.int_arg(6), k.f(float("-inf"))
    worths = k.at(choice, groups * size, F32)
    with k.loop(0, groups) as group:
        best, second = k.var(lowest), k.var(lowest)
        with k.loop(group * size, (group + 1) * size) as i:
            value = k.load(choice, i, F32)
            second.set(k.most(k.least(value, best.get()), second.get()))
            best.set(k.most(value, best.get()))
        both = best.get() + second.get()
        k.store(k.select(k.int_arg(7) > 0, both, best.get()), worths, group)
    with k.loop(0, groups) as group:
        mine, better = k.load(worths, group, F32), k.var(k.i(0))
        with k.loop(0, groups) as other:
            theirs = k.load(worths, other, F32)
            ahead = (theirs > mine) | (theirs.equals(mine) & (other < group))
            better.set(better.get() + k.select(ahead, k.i(1), k.i(0)))
        with k.when(better.get() >= kept), k.loop(group * size, (group + 1) * size) as i:
            k.store(lowest, choice, i)


def _choose(k: Kernel, scores: Value, choice: Value, ids: Value, shares: Value) -> None:
    """The top_k largest of `choice`, the lower index first of equals, and their shares by `scores`."""
    experts, top_k = k.int_arg(2), k.int_arg(4)
    lowest = k.f(float("-inf"))
    sum_ = k.var(k.f(0.0))
    with k.loop(0, top_k) as j:
        best, index = k.var(lowest), k.var(k.i(0))
        with k.loop(0, experts) as i:
            value = k.load(choice, i, F32)
            larger = value > best.get()
            best.set(k.select(larger, value, best.get()))
            index.set(k.select(larger, i, index.get()))
        k.store(lowest, choice, index.get())
        k.store(k.narrow(index.get(), I32), ids, j)
        share = k.load(scores, index.get(), F32)
        k.store(share, shares, j)
        sum_.set(sum_.get() + share)
    divisor = k.select(k.int_arg(8) > 0, sum_.get() + TINY, k.f(1.0))
    with k.loop(0, top_k) as j:
        k.store(k.load(shares, j, F32) / divisor * k.float_arg(9), shares, j)


@kernel
def assign(k: Kernel) -> None:
    """Chunks of rows that share an expert, in order of experts and, within one, of tokens.

    ids int32 [rows, chosen]. Row r of the chunks is choice targets[r] = token * chosen + j of the token
    sources[r]. places: int64, one an expert.
    """
    ids, places, sources, targets, chunks = (k.ptr_arg(i) for i in (1, 4, 5, 6, 7))
    chosen, experts = k.int_arg(2), k.int_arg(3)
    rows = k.load(k.ptr_arg(0), 0, I64)

    def place_of(choice: Value) -> Value:
        return k.at(places, k.extend(k.load(ids, choice, I32), I64), I64)

    with k.items(k.ptr_arg(8), k.i(1)):
        with k.loop(0, experts) as expert:
            k.store(k.i(0), places, expert)
        with k.loop(0, rows * chosen) as choice:
            at = place_of(choice)
            k.store(k.load(at, 0, I64) + 1, at, 0)
        count, first = k.var(k.i(0)), k.var(k.i(0))
        with k.loop(0, experts) as expert:
            own, begin = k.load(places, expert, I64), first.get()
            cuts = (own + (BLOCK_ROWS - 1)) // BLOCK_ROWS
            with k.when(own > 0):
                size = (own + (cuts - 1)) // cuts
                with k.loop(0, own, size) as start:
                    at = count.get() * CHUNK + CHUNK_FIRST
                    for i, value in enumerate((expert, begin + start, k.least(size, own - start))):
                        k.store(value, chunks, at + i)
                    count.set(count.get() + 1)
            k.store(begin, places, expert)
            first.set(begin + own)
        k.store(count.get(), chunks, CHUNK_COUNT)
        k.store(first.get(), chunks, CHUNK_ROWS)
        with k.loop(0, rows) as row, k.loop(0, chosen) as j:
            choice = row * chosen + j
            at = place_of(choice)
            place = k.load(at, 0, I64)
            k.store(place + 1, at, 0)
            k.store(row, sources, place)
            k.store(choice, targets, place)


@kernel
def combine(k: Kernel) -> None:
    """out[t] = sum over j of x[t * chosen + j] * shares[t, j], in order of j."""
    x, shares, out = k.ptr_arg(1), k.ptr_arg(2), k.ptr_arg(4)
    chosen, width = k.int_arg(3), k.int_arg(5)
    with k.items(k.ptr_arg(6), k.load(k.ptr_arg(0), 0, I64)) as row:
        own = k.at(x, row * chosen * width, F32)
        weights = k.at(shares, row * chosen, F32)

        def one(index: Value, kind: Any) -> None:
            def part(j: Value) -> Value:
                share = k.load(weights, j, F32)
                return k.load(own, width * j + index, kind) * (k.splat(share) if kind == VF else share)

            sum_ = k.var(part(k.i(0)))
            with k.loop(1, chosen) as j:
                sum_.set(sum_.get() + part(j))
            k.store(sum_.get(), out, row * width + index)

        across(k, width, one)
