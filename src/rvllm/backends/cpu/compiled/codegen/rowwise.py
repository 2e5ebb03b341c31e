"""Kernels that take a row at a time: embedding, norms, rope and cache writes, activations, residuals.

Each is written once and compiled for a full vector and, for the end of a row, for single elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rvllm.backends.cpu.compiled.codegen.emit import F32, I8, I32, I64, VF, Kernel, Value, kernel
from rvllm.backends.cpu.compiled.codegen.mathematics import ACTIVATIONS, tanh
from rvllm.backends.cpu.compiled.formats import Format
from rvllm.backends.cpu.compiled.slots import (
    BLOCK,
    IDS,
    LANES,
    PLACES,
    POSITIONS,
    SAMPLES,
    TOKENS,
    WANTED,
)
from rvllm.program.ops.dense import Activation

EMBED = ("step", "data", "tile_bytes", "width", "out", "scale", "counter")
NORM = (
    "rows", "x", "x_width", "start", "slices", "length", "weight", "bias", "eps", "out", "out_width",
    "out_start", "counter",
)  # fmt: skip
ROPE = (
    "step", "qkv", "qkv_width", "heads", "kv_heads", "dim", "half", "cos", "sin", "keys", "values",
    "padded_dim", "counter",
)  # fmt: skip
ACTIVATE = ("rows", "x", "x_width", "out", "out_width", "counter")
ADD = ("rows", "x", "y", "width", "scale", "counter")
GATHER = ("step", "x", "out", "width", "counter")
FINISH = ("rows", "x", "width", "bias", "scale", "cap", "counter")


def across(k: Kernel, length: Value, work: Callable[[Value, Any], None]) -> None:
    """work(index, type) for all of a row: 16 elements at a time, then one by one."""
    whole = length // LANES * LANES
    with k.loop(0, whole, LANES) as index:
        work(index, VF)
    with k.loop(whole, length) as index:
        work(index, F32)


@kernel
def embed(k: Kernel, form: Format) -> None:
    """out[t] = table[token[t]] * scale."""
    step, width, out, scale = k.ptr_arg(0), k.int_arg(3), k.ptr_arg(4), k.float_arg(5)
    ids = k.load(step, IDS, k.args.type)
    with k.items(k.ptr_arg(6), k.load(step, TOKENS, I64)) as row:
        token = k.extend(k.load(ids, row, I32), I64, signed=True)
        lane = token % LANES
        tile = k.at(k.ptr_arg(1), token // LANES * k.int_arg(2))
        with k.loop(0, width) as index:
            value = _element(k, form, tile, index, lane)
            k.store(value * scale, out, row * width + index)


def _element(k: Kernel, form: Format, tile: Value, index: Value, lane: Value) -> Value:
    """Element `index` of the tile's row in this lane."""
    if not form.group:
        return k.number(form.name, tile, index * LANES + lane)
    record = k.at(tile, index // form.group * form.record)
    place = index % form.group
    levels = k.at(record, form.levels_at)
    if form.bits == 4:
        pair = k.extend(k.load(levels, place // 2 * LANES + lane, I8), I32)
        level = (pair >> (k.narrow(place & 1, I32) * 4)) & 15
        level = level - form.offset
    else:
        level = k.extend(k.load(levels, place * LANES + lane, I8), I32, signed=True)
    value = k.to_float(level) * k.number(form.scale, record, lane + 0)
    return value + k.number(form.scale, record, lane + LANES) if form.minimum else value


@kernel
def norm(k: Kernel, centred: bool) -> None:
    """Slices of a row over their root mean square (centred: their deviation), times weight, plus bias."""
    x, weight, bias, out = (k.ptr_arg(i) for i in (1, 6, 7, 9))
    slices, length, eps = k.int_arg(4), k.int_arg(5), k.float_arg(8)
    count = k.to_float(k.narrow(length, I32))
    with k.items(k.ptr_arg(12), k.load(k.ptr_arg(0), 0, I64) * slices) as item:
        row, slice_ = item // slices, item % slices
        source = k.at(x, row * k.int_arg(2) + k.int_arg(3) + slice_ * length, F32)
        target = k.at(out, row * k.int_arg(10) + k.int_arg(11) + slice_ * length, F32)
        mean = _mean(k, length, count, lambda i, kind: k.load(source, i, kind)) if centred else k.f(0.0)

        def deviation(index: Value, kind: Any) -> Value:
            value = k.load(source, index, kind)
            return value - (k.splat(mean) if kind == VF else mean) if centred else value

        def square(index: Value, kind: Any) -> Value:
            value = deviation(index, kind)
            return value * value

        inverse = k.sqrt(_mean(k, length, count, square) + eps)

        def scaled(index: Value, kind: Any) -> None:
            value = deviation(index, kind) / (k.splat(inverse) if kind == VF else inverse)
            place = slice_ * length + index
            value = value * k.load(weight, place, kind)
            k.store(value + k.load(bias, place, kind) if centred else value, target, index)

        across(k, length, scaled)


def _mean(k: Kernel, length: Value, count: Value, of: Callable[[Value, Any], Value]) -> Value:
    return total(k, length, of) / count


def total(k: Kernel, length: Value, of: Callable[[Value, Any], Value]) -> Value:
    """The sum of `of` over 0 .. length - 1: lanes first, then what is behind the last whole vector."""
    lanes_, rest = k.var(k.vf(0.0)), k.var(k.f(0.0))

    def add(index: Value, kind: Any) -> None:
        sum_ = lanes_ if kind == VF else rest
        sum_.set(sum_.get() + of(index, kind))

    across(k, length, add)
    return k.total(lanes_.get()) + rest.get()


@kernel
def rope(k: Kernel, interleaved: bool) -> None:
    """Rotates queries and keys and writes keys and values to the cache.

    The cache holds keys as [block][head][dim][16 tokens] and values as [block][head][16 tokens][dim].
    """
    step, qkv, cos, sin, keys, values = (k.ptr_arg(i) for i in (0, 1, 7, 8, 9, 10))
    width, heads, kv_heads, dim, half, padded = (k.int_arg(i) for i in (2, 3, 4, 5, 6, 11))
    positions, places = (k.load(step, slot, k.args.type) for slot in (POSITIONS, PLACES))
    with k.items(k.ptr_arg(12), k.load(step, TOKENS, I64)) as row:
        angle = k.load(positions, row, I64) * half
        cosines, sines = k.at(cos, angle, F32), k.at(sin, angle, F32)
        line = k.at(qkv, row * width, F32)

        with k.loop(0, heads + kv_heads) as head:
            rotate(k, k.at(line, head * dim, F32), half, cosines, sines, interleaved)

        place = k.load(places, row, I64)
        block, token = place // BLOCK, place % BLOCK
        with k.loop(0, kv_heads) as head:
            key = k.at(line, (heads + head) * dim, F32)
            value = k.at(line, (heads + kv_heads + head) * dim, F32)
            to = block * kv_heads + head
            key_to = k.at(keys, to * dim * BLOCK + token, F32)
            value_to = k.at(values, (to * BLOCK + token) * padded, F32)
            with k.loop(0, dim) as index:
                k.store(k.load(key, index, F32), key_to, index * BLOCK)
            across(k, dim, lambda i, kind: k.store(k.load(value, i, kind), value_to, i))


def rotate(k: Kernel, head: Value, half: Value, cosines: Value, sines: Value, interleaved: bool) -> None:
    """Turns `half` pairs of a head's elements by as many angles."""

    def turn(first: Value, second: Value, index: Value, kind: Any) -> None:
        a, b = k.load(head, first, kind), k.load(head, second, kind)
        c, s = k.load(cosines, index, kind), k.load(sines, index, kind)
        k.store(a * c - b * s, head, first)
        k.store(b * c + a * s, head, second)

    if interleaved:
        with k.loop(0, half) as index:
            turn(index * 2, index * 2 + 1, index, F32)
    else:
        across(k, half, lambda index, kind: turn(index, index + half, index, kind))


@kernel
def activate(k: Kernel, activation: Activation, gated: bool) -> None:
    """act(x), or act(first half) * second half."""
    x, out, width = k.ptr_arg(1), k.ptr_arg(3), k.int_arg(4)
    with k.items(k.ptr_arg(5), k.load(k.ptr_arg(0), 0, I64)) as row:
        source, target = k.at(x, row * k.int_arg(2), F32), k.at(out, row * width, F32)

        def one(index: Value, kind: Any) -> None:
            value = ACTIVATIONS[activation](k, k.load(source, index, kind))
            k.store(value * k.load(source, index + width, kind) if gated else value, target, index)

        across(k, width, one)


@kernel
def add(k: Kernel) -> None:
    """x += y * scale."""
    x, y, width, scale = k.ptr_arg(1), k.ptr_arg(2), k.int_arg(3), k.float_arg(4)
    with k.items(k.ptr_arg(5), k.load(k.ptr_arg(0), 0, I64)) as row:

        def one(index: Value, kind: Any) -> None:
            at = row * width + index
            k.store(k.load(x, at, kind) + k.load(y, at, kind) * _like(k, scale, kind), x, at)

        across(k, width, one)


@kernel
def gather(k: Kernel) -> None:
    """out[s] = x[wanted[s]]."""
    step, x, out, width = k.ptr_arg(0), k.ptr_arg(1), k.ptr_arg(2), k.int_arg(3)
    wanted = k.load(step, WANTED, k.args.type)
    with k.items(k.ptr_arg(4), k.load(step, SAMPLES, I64)) as row:
        source = k.load(wanted, row, I64) * width
        across(k, width, lambda i, kind: k.store(k.load(x, source + i, kind), out, row * width + i))


@kernel
def finish(k: Kernel, capped: bool) -> None:
    """x = x * scale + bias, then cap * tanh(x / cap)."""
    x, width, bias, scale, cap = (
        k.ptr_arg(1), k.int_arg(2), k.ptr_arg(3), k.float_arg(4), k.float_arg(5)
    )  # fmt: skip
    with k.items(k.ptr_arg(6), k.load(k.ptr_arg(0), 0, I64)) as row:

        def one(index: Value, kind: Any) -> None:
            at = row * width + index
            value = k.load(x, at, kind) * _like(k, scale, kind) + k.load(bias, index, kind)
            if capped:
                limit = _like(k, cap, kind)
                value = tanh(k, value / limit) * limit
            k.store(value, x, at)

        across(k, width, one)


def _like(k: Kernel, scalar: Value, kind: Any) -> Value:
    return k.splat(scalar) if kind == VF else scalar
