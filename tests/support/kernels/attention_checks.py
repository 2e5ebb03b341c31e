"""Attention kernels against the NumPy reference, and bit for bit against each other."""

from __future__ import annotations

import ctypes
from copy import copy
from dataclasses import dataclass

import numpy as np

from rvllm.backends.cpu.reference import fp8_cache, ops
from rvllm.backends.cuda.device.driver import TensorMap
from rvllm.backends.cuda.ops.attention.plan import (
    plan_decode,
    plan_decode_ring,
    plan_prefill,
    plan_prefill_sm90,
    prefill_tiles,
    table_stride,
)
from rvllm.kernels.attention.specs import decode_rope_kernel, decode_turn_kernel
from rvllm.program.dtypes import DType
from rvllm.program.rope import Rope
from support.kernels.fp8_cache_checks import key_places, lowest, pieces, value_places
from support.kernels.harness import BF16, SHORT, Array, Gpu, error, expect, rounded

BLOCK = 16
POISON = np.float32(np.nan)


@dataclass
class Shape:
    """Heads, their size, what the queries see, and by how much keys grow from one position to the next.

    With growth later tiles have far larger maxima, so that states are brought to new references.
    """

    dim: int
    kv_heads: int
    group: int
    window: int | None = None
    soft_cap: float | None = None
    growth: float = 0.0

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


class Cache:
    """A paged cache on the GPU with sequences of given lengths in shuffled blocks; unused blocks are NaN."""

    def __init__(
        self,
        gpu: Gpu,
        rng: np.random.Generator,
        dtype: np.dtype,
        shape: Shape,
        lens: list[int],
        fp8: bool = False,
    ) -> None:
        self.gpu, self.shape, self.dtype, self.lens, self.fp8 = gpu, shape, dtype, lens, fp8
        counts = [-(-n // BLOCK) for n in lens]
        self.num_blocks = sum(counts) + 3
        order = rng.permutation(self.num_blocks)
        self.stride = table_stride(max(lens))
        tables = np.full((len(lens), self.stride), self.num_blocks + 10**6, np.int32)
        store = np.full((2, self.num_blocks, shape.kv_heads, BLOCK, shape.dim), POISON, np.float32)
        self.k, self.v = [], []
        used = 0
        for s, n in enumerate(lens):
            own = order[used : used + counts[s]]
            used += counts[s]
            tables[s, : counts[s]] = own
            for which, keep in ((0, self.k), (1, self.v)):
                values = rng.standard_normal((n, shape.kv_heads, shape.dim), np.float32)
                if which == 0:
                    values *= 1 + np.float32(shape.growth) * np.arange(n, dtype=np.float32)[:, None, None]
                values = rounded(values, dtype)
                if fp8:
                    values = fp8_cache.loaded(fp8_cache.stored(values, lowest(dtype)))
                keep.append(values)
                at = np.arange(n)
                store[which, own[at // BLOCK], :, at % BLOCK] = values
        self.tables = gpu.array(tables)
        self.plain = [gpu.array(part.astype(dtype)) for part in store]  # in 16 bits
        self.k_cache, self.v_cache = self.plain
        if fp8:
            self.k_cache = gpu.array(pieces(store[0], dtype, key_places(shape.dim)))
            self.v_cache = gpu.array(pieces(store[1], dtype, value_places(shape.dim)))

    def in_sixteen_bits(self) -> Cache:
        """The same numbers in a cache that is not in E4M3."""
        other = copy(self)
        other.fp8, (other.k_cache, other.v_cache) = False, self.plain
        return other

    def maps(self) -> list[TensorMap]:
        """Tensor maps of keys and values, in boxes of a block and 64 columns."""
        rows, dim = self.num_blocks * self.shape.kv_heads * BLOCK, self.shape.dim
        return [
            TensorMap.matrix(a.address, rows, dim, 2 * dim, BLOCK, 64, self.dtype == BF16)
            for a in (self.k_cache, self.v_cache)
        ]


def scale_of(shape: Shape) -> float:
    return float(np.float32(1.7 / np.sqrt(shape.dim)))


def common(shape: Shape, cache: Cache, pitch: int, out_pitch: int) -> list[object]:
    return [pitch, out_pitch, cache.stride, shape.kv_heads, shape.group, scale_of(shape),
            float(shape.soft_cap or 0.0), shape.window or 0]  # fmt: skip


def decode(
    gpu: Gpu, cache: Cache, q: np.ndarray, slots: np.ndarray, kv_lens: np.ndarray, *,
    pad: int = 0, blocks: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Decode attention of queries [S, heads, dim] at positions kv_lens - 1; out float32 [S, heads, dim].

    By attn_decode_ring where the machine takes it, else by attn_decode.
    """
    shape, count = cache.shape, len(slots)
    dtype, plan = DType.parse(cache.dtype.name), None
    sizes = {"max_seqs": count + pad, "max_model_len": max(cache.lens), "num_blocks": 10**9,
             "sm_count": gpu.facts.sm_count, "smem_per_block": gpu.facts.smem_per_block,
             "fp8": cache.fp8}  # fmt: skip
    if gpu.facts.smem_per_block > 200000:
        plan = plan_decode_ring(dtype, shape.dim, shape.heads, shape.kv_heads, **sizes)
    if plan is None:
        plan = plan_decode(dtype, shape.dim, shape.heads, shape.kv_heads, **sizes)
    width = shape.heads * shape.dim
    pitch = width + 2 * shape.kv_heads * shape.dim
    rows = np.full((count + pad, pitch), POISON, np.float32)
    rows[:count, :width] = q.reshape(count, width)
    out = gpu.empty((count + pad, width), cache.dtype)
    padded = [np.concatenate([a, np.full(pad, -7, np.int32)]) for a in (slots, kv_lens)]
    arrivals = gpu.zeros((plan.arrivals_bytes // 4,), np.int32)
    partial = gpu.empty((plan.partial_bytes // 4,), np.float32)
    args = [out, gpu.array(rows.astype(cache.dtype)), cache.k_cache, cache.v_cache, cache.tables,
            *(gpu.array(p, np.int32) for p in padded), gpu.array([count], np.int32), partial, arrivals,
            *common(shape, cache, pitch, width), count + pad]  # fmt: skip
    if plan.ring:
        args += cache.maps() if gpu.facts.capability >= 90 else [no_map(), no_map()]
    gpu.launch(plan.kernel, blocks or plan.grid, plan.block, args, plan.smem)
    result = out.get()
    assert not arrivals.get().any(), "arrival counters are not back at zero"
    assert np.isnan(result[count:].astype(np.float32)).all(), "rows beyond the count were written"
    return result[:count].reshape(count, shape.heads, shape.dim).astype(np.float32)


def no_map() -> ctypes.Array[ctypes.c_ubyte]:
    """In the place of a tensor map where lanes copy: 128 bytes, aligned as one."""
    room = (ctypes.c_ubyte * 192)()
    return (ctypes.c_ubyte * 128).from_buffer(room, -ctypes.addressof(room) % 64)


def prefill(
    gpu: Gpu, cache: Cache, q: list[np.ndarray], slots: np.ndarray, kv_lens: np.ndarray, first: int = 0, *,
    small: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """attn_prefill of per-sequence queries [n, heads, dim] that end at kv_lens; not the first `first`."""
    shape = cache.shape
    dtype, plan = DType.parse(cache.dtype.name), None
    if gpu.facts.capability == 90 and not (small or shape.soft_cap):
        plan = plan_prefill_sm90(dtype, shape.dim, sm_count=gpu.facts.sm_count, fp8=cache.fp8)
    if plan is None:
        limit = 101376 if small else gpu.facts.smem_per_block
        plan = plan_prefill(dtype, shape.dim, smem_per_block=limit, fp8=cache.fp8)
    lens = np.array([len(x) for x in q], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    width = shape.heads * shape.dim
    pitch = width + 2 * shape.kv_heads * shape.dim
    rows = np.full((offsets[-1], pitch), POISON, np.float32)
    rows[:, :width] = np.concatenate(q).reshape(-1, width)
    out = gpu.empty((int(offsets[-1]), width), cache.dtype)
    tiles = prefill_tiles(lens, kv_lens.astype(np.int32), first, shape.group, plan.rows)
    seqs = [cache.tables, gpu.array(slots, np.int32), gpu.array(kv_lens, np.int32), gpu.array(offsets)]
    queries, numbers = gpu.array(rows.astype(cache.dtype)), common(shape, cache, pitch, width)
    if plan.persistent:
        *pitches, _, window = numbers
        keys_values = [cache.k_cache, cache.v_cache] if cache.fp8 else cache.maps()
        args = [out, queries, *keys_values, *seqs, gpu.array(tiles), gpu.array([len(tiles)], np.int32),
                *pitches, window]  # fmt: skip
        gpu.launch(plan.kernel, plan.persistent, plan.block, args, plan.smem)
    else:
        args = [out, queries, cache.k_cache, cache.v_cache, *seqs, gpu.array(tiles), *numbers]
        gpu.launch(plan.kernel, (len(tiles), shape.kv_heads), plan.block, args, plan.smem)
    result = out.get().astype(np.float32)
    assert np.isnan(result[: offsets[first]]).all(), "rows of decodes were written by prefill"
    parts = np.split(result, offsets[1:-1])
    return [p.reshape(-1, shape.heads, shape.dim) for p in parts]


def same_bits(out: np.ndarray, wanted: np.ndarray, what: str) -> None:
    """Raises AssertionError where two arrays of float32 differ in a bit."""
    wrong = np.argwhere(out.view(np.uint32) != wanted.view(np.uint32))
    assert not len(wrong), f"{what}: {len(wrong)} elements differ, first at {wrong[0]}"


def reference(cache: Cache, slot: int, q: np.ndarray, start: int) -> np.ndarray:
    """ops.attention of queries at start, start + 1, ... of a slot."""
    end, shape = start + len(q), cache.shape
    return ops.attention(
        q, cache.k[slot][:end], cache.v[slot][:end], start, scale_of(shape), shape.window, shape.soft_cap
    )


def queries(rng: np.random.Generator, dtype: np.dtype, n: int, shape: Shape) -> np.ndarray:
    return rounded(rng.standard_normal((n, shape.heads, shape.dim), np.float32), dtype)


def check_decode(
    gpu: Gpu, rng: np.random.Generator, dtype: np.dtype, shape: Shape, fp8: bool = False
) -> float:
    """Decodes of many context lengths at once, with padding rows; the worst relative error.

    fp8: over a cache in E4M3, with the bits that the same numbers in 16 bits give.
    """
    lens = [1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256, 257, 511, 513, 777, 1100]
    cache = Cache(gpu, rng, dtype, shape, lens, fp8)
    slots = rng.permutation(len(lens)).astype(np.int32)
    kv_lens = np.array([lens[s] for s in slots], np.int32)
    q = queries(rng, dtype, len(lens), shape)
    worst = 0.0
    for blocks in (None, 1, 7, 400):
        out = decode(gpu, cache, q, slots, kv_lens, pad=3, blocks=blocks)
        if fp8:
            same_bits(out, decode(gpu, cache.in_sixteen_bits(), q, slots, kv_lens), f"decode {shape}")
        for i, slot in enumerate(slots):
            worst = max(worst, error(out[i], reference(cache, slot, q[i : i + 1], lens[slot] - 1)[0]))
    expect(f"decode {dtype} {shape}", worst, 8e-3 if dtype.name == "bfloat16" else 1.5e-3)
    return worst


def check_prefill(
    gpu: Gpu, rng: np.random.Generator, dtype: np.dtype, shape: Shape, longest: int = 300, fp8: bool = False
) -> float:
    """Ragged chunks behind two decodes, some starting deep in their sequence; the worst relative error.

    fp8: as in `check_decode`.
    """
    lens, chunks = [40, 300, 1, 33, 200, 300, longest + 231], [1, 1, 1, 33, 130, 37, longest]
    cache = Cache(gpu, rng, dtype, shape, lens, fp8)
    slots = np.arange(len(lens), dtype=np.int32)[::-1].copy()
    slots[:2], slots[2:] = [0, 1], [2, 3, 4, 5, 6]
    q = [queries(rng, dtype, n, shape) for n in chunks]
    worst = 0.0
    for small in (False, True):
        out = prefill(gpu, cache, q, slots, np.array(lens, np.int32), 2, small=small and shape.dim <= 160)
        if fp8:
            plain = prefill(gpu, cache.in_sixteen_bits(), q, slots, np.array(lens, np.int32), 2)
            for s in range(2, len(lens)):
                same_bits(out[s], plain[s], f"prefill {shape}")
        for s in range(2, len(lens)):
            worst = max(worst, error(out[s], reference(cache, s, q[s], lens[s] - chunks[s])))
    expect(f"prefill {dtype} {shape}", worst, 8e-3 if dtype.name == "bfloat16" else 1.5e-3)
    return worst


def check_invariance(
    gpu: Gpu, rng: np.random.Generator, dtype: np.dtype, shape: Shape, length: int = 1300, fp8: bool = False
) -> int:
    """A sequence's outputs have the same bits in one piece, in chunks, as decodes, alone and in a batch."""
    cache = Cache(gpu, rng, dtype, shape, [length, 300], fp8)
    q = queries(rng, dtype, length, shape)
    (whole,) = prefill(gpu, cache, [q], np.array([0]), np.array([length]))
    assert np.isfinite(whole).all(), "outputs that are no numbers"
    compared = 0

    def same(out: np.ndarray, positions: slice | np.ndarray, what: str) -> None:
        nonlocal compared
        wanted = whole[positions]
        wrong = np.argwhere(out.view(np.uint32) != wanted.view(np.uint32))
        assert not len(wrong), f"{what} {dtype} {shape}: {len(wrong)} elements differ, first at {wrong[0]}"
        compared += out.size

    other = queries(rng, dtype, 90, shape)
    for small in (False, True) if shape.dim <= 160 else (False,):
        cuts = np.sort(rng.choice(np.arange(1, length), 7, replace=False))
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            out = prefill(
                gpu, cache, [other, q[begin:end]], np.array([1, 0]), np.array([250, end]), small=small
            )
            same(out[1], slice(begin, end), f"prefill chunk {begin}:{end}")
    edges = [0, 15, 16, 63, 64, 255, 256, 511, 512, 1023, 1024, length - 1]
    positions = np.unique(np.concatenate([rng.choice(length, 90), edges]))
    positions = positions[positions < length]
    ends = (positions + 1).astype(np.int32)
    zeros = np.zeros(len(positions), np.int32)
    out = decode(gpu, cache, q[positions], zeros, ends, pad=2, blocks=int(rng.integers(1, 64)))
    same(out, positions, "decode in a batch")
    for p in (0, 70, 257, length - 1):
        out = decode(gpu, cache, q[p : p + 1], np.zeros(1, np.int32), np.array([p + 1], np.int32))
        same(out, slice(p, p + 1), "decode alone")
    return compared


def check_turning(
    gpu: Gpu,
    rng: np.random.Generator,
    dtype: np.dtype,
    shape: Shape,
    copies: int = 1,
    *,
    ring: bool = True,
    rotated: int | None = None,
    normed: bool = False,
    fp8: bool = False,
) -> int:
    """Rotation within decode attention: outputs and cache have the bits of the two kernels one by one.

    copies: how often each context length occurs; many rows are dealt out in another way than few. ring: by
    the kernel with rings, else by attn_decode; rotated: elements of a head, all of them by default; normed:
    with norms of heads in front; fp8: over a cache in E4M3, with rings.
    """
    rotated = shape.dim if rotated is None else rotated
    lens = [1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 97, 130, 255, 256, 257, 300, 513, 1100] * copies
    count, seed, heads = len(lens), int(rng.integers(1 << 30)), shape.heads + 2 * shape.kv_heads
    pitch = heads * shape.dim
    sizes = {"max_seqs": count + 2, "max_model_len": max(lens), "num_blocks": 10**9,
             "sm_count": gpu.facts.sm_count, "smem_per_block": gpu.facts.smem_per_block,
             "fp8": fp8}  # fmt: skip
    find, turned_kernel = (
        (plan_decode_ring, decode_rope_kernel) if ring else (plan_decode, decode_turn_kernel)
    )
    more = {"rotates": True} if ring else {}
    plan = find(DType.parse(dtype.name), shape.dim, shape.heads, shape.kv_heads, **sizes, **more)
    assert plan is not None
    turning = turned_kernel(plan.kernel)
    assert turning is not None
    weights = [gpu.array(rng.standard_normal(shape.dim, np.float32)) for _ in range(2 * normed)]
    norms = [*weights, 0, 0, 1e-6]
    rows = rounded(rng.standard_normal((count + 2, pitch), np.float32), dtype).astype(dtype)
    order = rng.permutation(count).astype(np.int32)
    slots = gpu.array(np.concatenate([order, [-7, -7]]), np.int32)
    kv_lens = gpu.array(np.concatenate([np.array(lens)[order], [-7, -7]]), np.int32)
    positions = gpu.array(np.concatenate([np.array(lens)[order] - 1, [0, 0]]), np.int32)
    angles = [gpu.array(a) for a in Rope(dim=rotated or 4, theta=1e4).table(max(lens))]
    found = []
    for fused in (False, True):
        cache = Cache(gpu, np.random.default_rng(seed), dtype, shape, lens, fp8)
        qkv, out = gpu.array(rows), gpu.empty((count + 2, shape.heads * shape.dim), dtype)
        number = gpu.array([count], np.int32)
        if not fused:
            turned = [qkv, cache.k_cache, cache.v_cache, *angles, cache.tables, positions, slots, number,
                      pitch, cache.stride, shape.heads, shape.kv_heads, shape.dim, rotated]  # fmt: skip
            name = f"sm80_{SHORT[dtype.name]}_rope_kv{'_fp8' * fp8}{'_rms' * normed}"
            gpu.launch(name, (-(-heads // 4), count + 2), 128, [*turned, *(norms if normed else ())])
        arrivals = gpu.zeros((plan.arrivals_bytes // 4,), np.int32)
        maps = cache.maps() if gpu.facts.capability >= 90 and not fp8 else [no_map(), no_map()]
        args = [out, qkv, cache.k_cache, cache.v_cache, cache.tables, slots, kv_lens, number,
                gpu.empty((plan.partial_bytes // 4,), np.float32), arrivals,
                *common(shape, cache, pitch, shape.heads * shape.dim), count + 2,
                *(maps if ring and not fp8 else ()),
                *(angles if fused else ())]  # fmt: skip
        if fused and not ring:
            none = ctypes.c_void_p(0)
            args += [rotated, int(normed), *(norms if normed else (none, none, 0, 0, 0.0))]
        gpu.launch(turning if fused else plan.kernel, plan.grid, plan.block, args, plan.smem)
        assert not arrivals.get().any(), "arrival counters are not back at zero"
        found.append([a.get().view(np.uint8) for a in (out, cache.k_cache, cache.v_cache)])
    for what, one, other in zip(("outputs", "keys", "values"), *found, strict=True):
        wrong = np.argwhere(one != other)
        assert not len(wrong), f"{what} {dtype} {shape}: {len(wrong)} elements differ, first at {wrong[0]}"
    assert np.isfinite(found[0][0][:count].view(dtype).astype(np.float32)).all()
    return found[0][0].size


SHAPES = [
    Shape(128, 4, 7),
    Shape(64, 3, 3),
    Shape(80, 2, 1),
    Shape(96, 1, 20, soft_cap=20.0),
    Shape(128, 1, 32, window=100),
    Shape(256, 2, 2, window=300, soft_cap=50.0),
    Shape(64, 2, 16, window=64),
    Shape(128, 2, 4, growth=0.02),
]

__all__ = ["SHAPES", "Array", "check_decode", "check_invariance", "check_prefill"]
