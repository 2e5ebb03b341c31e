"""Kernels of latent attention against the NumPy reference, and bit for bit against each other.

Each check takes a `Gpu` or an `Emulator`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rvllm.backends.cpu.reference import ops
from rvllm.backends.cpu.reference.mla import head_linear, rotate_last
from rvllm.backends.cpu.threads import Workers
from rvllm.backends.cuda.device.driver import TensorMap
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.ops.attention.plan import prefill_tiles, table_stride
from rvllm.backends.cuda.ops.mla.plan import LatentShape, plan_decode, plan_prefill, plan_prefill_sm90
from rvllm.kernels.mla.specs import EIGHTS, prefill_sm90_totals, product_chunks, product_smem
from rvllm.program.dtypes import DType
from support.kernels.harness import BF16, Array, Machine, error, expect, rounded

BLOCK = 16
POISON = np.float32(np.nan)
TAG = {"bfloat16": "bf16", "float16": "f16"}
LIMIT = {"bfloat16": 8e-3, "float16": 1.5e-3}


@dataclass(frozen=True)
class Sizes:
    """A latent attention: heads, and elements of its parts."""

    heads: int
    rank: int
    rotated: int
    plain: int = 128
    value: int = 128

    @property
    def width(self) -> int:
        """Elements of a cached token, and of an absorbed query."""
        return self.rank + self.rotated

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(np.float32(1.3 / np.sqrt(self.width)))


LITE = Sizes(16, 512, 64)
TINY = Sizes(3, 64, 16, plain=24, value=40)
MANY = Sizes(20, 128, 32, plain=136, value=64)


def normal(rng: np.random.Generator, dtype: np.dtype, *shape: int) -> np.ndarray:
    """Standard normal numbers, as the type holds them."""
    return rounded(rng.standard_normal(shape, np.float32), dtype)


def same_bits(what: str, out: np.ndarray, wanted: np.ndarray) -> None:
    """Raises AssertionError unless two float32 arrays are equal bit for bit."""
    wrong = np.argwhere(out.view(np.uint32) != wanted.view(np.uint32))
    assert not len(wrong), f"{what}: {len(wrong)} of {out.size} elements differ, first at {wrong[0]}"


class Latents:
    """A paged cache with sequences of given lengths in shuffled blocks; what is not used is NaN."""

    def __init__(
        self, gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: Sizes, lens: list[int]
    ):
        self.gpu, self.sizes, self.dtype, self.lens = gpu, sizes, dtype, lens
        counts = [-(-n // BLOCK) for n in lens]
        self.num_blocks = sum(counts) + 3
        order = rng.permutation(self.num_blocks)
        self.stride = table_stride(max(lens))
        self.table = np.full((len(lens), self.stride), self.num_blocks + 10**6, np.int32)
        store = np.full((self.num_blocks, BLOCK, sizes.width), POISON, np.float32)
        self.keys, used = [], 0
        for s, n in enumerate(lens):
            own = order[used : used + counts[s]]
            used += counts[s]
            self.table[s, : counts[s]] = own
            values = normal(rng, dtype, n, sizes.width)
            self.keys.append(values)
            at = np.arange(n)
            store[own[at // BLOCK], at % BLOCK] = values
        self.tables = gpu.array(self.table)
        self.cache = gpu.array(store.astype(dtype))

    @property
    def shape(self) -> LatentShape:
        """What launches are planned for."""
        return LatentShape(self.sizes.heads, self.sizes.rank, self.sizes.rotated)


@dataclass
class Decoded:
    """What latent_decode left: mixed latents, and parts of those that several blocks share."""

    out: Array
    partial: Array
    gatherings: Array
    count: Array
    blocks: int
    spare: int


def limits(gpu: Machine) -> tuple[int, int]:
    """Shared memory a block may have here, and on the smallest cards: each chooses a kernel of its own."""
    return gpu.facts.smem_per_block, 101376


def decode(
    latents: Latents, q: np.ndarray, slots: np.ndarray, kv_lens: np.ndarray, *,
    pad: int = 0, blocks: int | None = None, smem_per_block: int = 0,
) -> Decoded:  # fmt: skip
    """latent_decode of queries [S, heads, width] at positions kv_lens - 1."""
    gpu, sizes, count = latents.gpu, latents.sizes, len(slots)
    plan = plan_decode(
        DType.parse(latents.dtype.name), latents.shape, max_seqs=count + pad, max_model_len=max(latents.lens),
        num_blocks=10**9, sm_count=blocks or gpu.facts.sm_count,
        smem_per_block=smem_per_block or limits(gpu)[0],
    )  # fmt: skip
    grid = blocks or plan.grid
    rows = np.full((count + pad, sizes.heads * sizes.width), POISON, np.float32)
    rows[:count] = q.reshape(count, -1)
    padded = [np.concatenate([a, np.full(pad, -7, np.int32)]) for a in (slots, kv_lens)]
    out = gpu.empty((count + pad, sizes.heads * sizes.rank), latents.dtype)
    spare = plan.spare
    partial = gpu.empty((grid * (spare + 1) * 16 * (sizes.rank + 2),), np.float32)
    parts = -(-sizes.heads // 16)
    gatherings = gpu.empty(((count + pad) * parts, 4), np.int32)
    counted = gpu.array([count], np.int32)
    args = [out, gpu.array(rows.astype(latents.dtype)), latents.cache, latents.tables,
            *(gpu.array(p, np.int32) for p in padded), counted, partial, gatherings, sizes.width, sizes.rank,
            sizes.heads, latents.stride, sizes.scale, count + pad, spare]  # fmt: skip
    gpu.launch(plan.kernel, grid, plan.block, args, plan.smem)
    return Decoded(out, partial, gatherings, counted, grid, spare)


def values(
    latents: Latents, mixed: Decoded, tokens: int, weight: np.ndarray | None = None, *, eights: int = 1
) -> np.ndarray:
    """The product over what latent_decode left, float32 [tokens, heads, value].

    Without a weight the first `value` elements of the mixed latents: a matrix with ones on its diagonal.
    """
    gpu, sizes, dtype = latents.gpu, latents.sizes, latents.dtype
    rows = sizes.value if weight is not None else sizes.rank
    if weight is None:
        weight = np.broadcast_to(np.eye(sizes.rank, dtype=np.float32), (sizes.heads, rows, sizes.rank))
    out = gpu.empty((tokens, sizes.heads * rows), dtype)
    chunks = product_chunks(rows, sizes.rank)
    tag = f"sm80_{TAG[dtype.name]}"
    args = [mixed.out, mixed.partial, mixed.gatherings, mixed.count, sizes.heads, sizes.rank, mixed.blocks,
            mixed.spare]  # fmt: skip
    gpu.launch(f"{tag}_latent_merge", (sizes.heads, tokens), 128, args)
    args = [out, mixed.out, gpu.array(weight.astype(dtype)), tokens, sizes.heads, rows, sizes.rank, 0]
    grid = (sizes.heads * chunks, -(-tokens // (8 * eights)))
    gpu.launch(f"{tag}_head_linear_n{8 * eights}", grid, 128, args, product_smem(sizes.rank, eights))
    found = out.get()
    if eights == 1:  # both in one launch
        args = [out, mixed.out, args[2], mixed.partial, mixed.gatherings, mixed.count]
        args += [tokens, sizes.heads, rows, sizes.rank, mixed.blocks, mixed.spare]
        out.put(np.zeros_like(found))
        gpu.launch(f"{tag}_latent_values_n8", grid, 128, args, product_smem(sizes.rank, 1))
        assert (out.get().view(np.uint16) == found.view(np.uint16)).all()
    return found.astype(np.float32).reshape(tokens, sizes.heads, rows)


def prefill(
    latents: Latents, q: list[np.ndarray], slots: np.ndarray, kv_lens: np.ndarray, first: int = 0, *,
    smem_per_block: int = 0, hopper: bool = False,
) -> list[np.ndarray]:  # fmt: skip
    """latent_prefill of per-sequence queries [n, heads, width] that end at kv_lens; not the first `first`.

    hopper: by the kernel with wgmma.
    """
    gpu, sizes, dtype = latents.gpu, latents.sizes, DType.parse(latents.dtype.name)
    plan = plan_prefill(dtype, latents.shape, smem_per_block or limits(gpu)[0])
    if hopper:
        planned = plan_prefill_sm90(dtype, latents.shape, DeviceInfo(90, gpu.facts.sm_count, 0))
        assert planned is not None
        plan = planned
    lens = np.array([len(x) for x in q], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    out = gpu.empty((int(offsets[-1]), sizes.heads * sizes.rank), latents.dtype)
    tiles = prefill_tiles(lens, kv_lens.astype(np.int32), first, sizes.heads, plan.rows)
    tiles = np.concatenate([tiles, [[-1, 0]]]).astype(np.int32)
    queries = gpu.array(np.concatenate(q).astype(latents.dtype))
    seqs = [latents.tables, gpu.array(slots, np.int32), gpu.array(kv_lens, np.int32), gpu.array(offsets),
            gpu.array(tiles)]  # fmt: skip
    if hopper:
        boxes = (
            (queries, int(offsets[-1]) * sizes.heads, 64),
            (latents.cache, latents.num_blocks * BLOCK, BLOCK),
        )
        maps = [
            TensorMap.matrix(a.address, rows, sizes.width, 2 * sizes.width, box, 64, latents.dtype == BF16)
            for a, rows, box in boxes
        ]
        grid = min(plan.persistent, len(tiles) - 1)
        totals = gpu.empty((prefill_sm90_totals() // 4,), np.float32)
        args = [out, *maps, *seqs, gpu.array([len(tiles) - 1], np.int32), totals, sizes.heads, latents.stride,
                sizes.scale]  # fmt: skip
    else:
        grid = len(tiles)
        args = [
            out,
            queries,
            latents.cache,
            *seqs,
            sizes.width,
            sizes.rank,
            sizes.heads,
            latents.stride,
            sizes.scale,
        ]
    gpu.launch(plan.kernel, grid, plan.block, args, plan.smem)
    result = out.get().astype(np.float32)
    assert np.isnan(result[: offsets[first]]).all(), "rows of decodes were written by prefill"
    return [p.reshape(-1, sizes.heads, sizes.rank) for p in np.split(result, offsets[1:-1])]


def reference(latents: Latents, slot: int, q: np.ndarray, start: int) -> np.ndarray:
    """Latent attention of queries [n, heads, width] at start, start + 1, ... of a slot."""
    keys = latents.keys[slot][: start + len(q)][:, None]
    return ops.attention(q, keys, keys[:, :, : latents.sizes.rank], start, latents.sizes.scale, None, None)


def check_decode(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: Sizes, lens: list[int]
) -> float:
    """Decodes of many contexts at once, with padding rows, for several grids; the worst relative error.

    Whatever is left in parts is put together by latent_merge.
    """
    latents = Latents(gpu, rng, dtype, sizes, lens)
    slots = rng.permutation(len(lens)).astype(np.int32)
    kv_lens = np.array([lens[s] for s in slots], np.int32)
    q = normal(rng, dtype, len(lens), sizes.heads, sizes.width)
    worst, first = 0.0, None
    for blocks, small, pad, eights in ((None, False, 3, 1), (1, True, 0, 8), (7, False, 1, 1)):
        limit = limits(gpu)[small]
        mixed = decode(latents, q, slots, kv_lens, pad=pad, blocks=blocks, smem_per_block=limit)
        out = values(latents, mixed, len(lens), eights=eights)
        first = out if first is None else first
        same_bits(f"decode {dtype} {sizes} on {blocks} blocks", out, first)
        for i, slot in enumerate(slots):
            wanted = reference(latents, slot, q[i : i + 1], lens[slot] - 1)[0]
            worst = max(worst, error(out[i], wanted))
    expect(f"latent decode {dtype} {sizes}", worst, LIMIT[dtype.name])
    return worst


def check_prefill(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: Sizes, lens: list[int], chunks: list[int]
) -> float:
    """Ragged chunks, some deep in their sequence, behind two decodes; the worst relative error."""
    latents = Latents(gpu, rng, dtype, sizes, lens)
    slots = np.arange(len(lens), dtype=np.int32)
    q = [normal(rng, dtype, n, sizes.heads, sizes.width) for n in chunks]
    worst = 0.0
    for limit in limits(gpu):
        out = prefill(latents, q, slots, np.array(lens, np.int32), 2, smem_per_block=limit)
        for s in range(2, len(lens)):
            worst = max(worst, error(out[s], reference(latents, s, q[s], lens[s] - chunks[s])))
    expect(f"latent prefill {dtype} {sizes}", worst, LIMIT[dtype.name])
    return worst


def check_prefill_sm90(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, heads: int, lens: list[int], chunks: list[int]
) -> int:
    """The kernel for Hopper gives the bits of the one for every GPU; how many elements were compared."""
    latents, compared = Latents(gpu, rng, dtype, Sizes(heads, 512, 64), lens), 0
    slots = rng.permutation(len(lens)).astype(np.int32)
    kv_lens = np.array(lens, np.int32)[slots]
    q = [3 * normal(rng, dtype, chunks[s], heads, 576) for s in slots]
    wanted, got = (prefill(latents, q, slots, kv_lens, hopper=hopper) for hopper in (False, True))
    for s, a, b in zip(slots, wanted, got, strict=True):
        same_bits(f"{chunks[s]} of {lens[s]} tokens under {heads} heads, {dtype}", b, a)
        compared += a.size
    return compared


def check_invariance(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: Sizes, length: int, *,
    cuts: int = 3, picks: int = 12,
) -> int:  # fmt: skip
    """A sequence has the same bits whole, in chunks beside another, and as decodes alone and in a batch."""
    latents = Latents(gpu, rng, dtype, sizes, [length, 120])
    q = normal(rng, dtype, length, sizes.heads, sizes.width)
    (whole,) = prefill(latents, [q], np.array([0]), np.array([length]))
    assert np.isfinite(whole).all(), "outputs that are no numbers"
    compared = 0
    other = normal(rng, dtype, 20, sizes.heads, sizes.width)
    for limit in limits(gpu):
        bounds = [0, *np.sort(rng.choice(np.arange(1, length), cuts, replace=False)), length]
        for begin, end in pairwise(bounds):
            queries, slots = [other, q[begin:end]], np.array([1, 0])
            out = prefill(latents, queries, slots, np.array([90, end]), smem_per_block=limit)[1]
            same_bits(f"chunk {begin}:{end} {dtype} {sizes}", out, whole[begin:end])
            compared += out.size
        edges = [p for p in (0, 15, 16, 63, 64, 255, 256, 511, 512, length - 1) if p < length]
        positions = np.unique(np.concatenate([rng.choice(length, picks), edges]))
        zeros, ends = np.zeros(len(positions), np.int32), (positions + 1).astype(np.int32)
        blocks = int(rng.integers(1, 12))
        mixed = decode(latents, q[positions], zeros, ends, pad=2, blocks=blocks, smem_per_block=limit)
        out = values(latents, mixed, len(positions))
        same_bits(f"decodes on {blocks} blocks {dtype} {sizes}", out, whole[positions])
        compared += out.size
    for p in (0, length - 1):
        ends = np.array([p + 1], np.int32)
        out = values(latents, decode(latents, q[p : p + 1], np.zeros(1, np.int32), ends), 1)
        same_bits(f"decode alone {dtype} {sizes}", out, whole[p : p + 1])
        compared += out.size
    return compared


def check_values(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: Sizes) -> float:
    """The product with W_uv over decodes in parts, then rows of prefill; the same bits in both widths."""
    lens = [300, 530, 20, 257]
    latents = Latents(gpu, rng, dtype, sizes, lens)
    kv_lens, slots = np.array(lens, np.int32), np.arange(len(lens), dtype=np.int32)
    q = normal(rng, dtype, len(lens), sizes.heads, sizes.width)
    weight = normal(rng, dtype, sizes.heads, sizes.value, sizes.rank) / np.float32(np.sqrt(sizes.rank))
    weight = rounded(weight, dtype)
    mixed = decode(latents, q, slots, kv_lens, pad=9, blocks=5)
    rest = normal(rng, dtype, 9, sizes.heads * sizes.rank)
    held = mixed.out.get()
    held[len(lens) :] = rest.astype(dtype)
    mixed.out.put(held)
    out = values(latents, mixed, len(lens) + 9, weight)
    same_bits(f"values {dtype} {sizes}", values(latents, mixed, len(lens) + 9, weight, eights=8), out)
    whole = values(latents, mixed, len(lens))
    x = np.concatenate([rounded(whole, dtype), rest.reshape(9, sizes.heads, sizes.rank)])
    wanted = head_linear(x, weight, Workers(1))
    worst = error(out, wanted)
    expect(f"latent values {dtype} {sizes}", worst, LIMIT[dtype.name])
    return worst


def check_head_linear(
    gpu: Machine,
    rng: np.random.Generator,
    dtype: np.dtype,
    tokens: int,
    shape: tuple[int, int, int],
    tail: int,
) -> float:
    """head_linear against the reference, rows beyond the tokens untouched; the same bits in both widths.

    shape: heads, rows and inner size of the weight.
    """
    heads, rows, inner = shape
    x = normal(rng, dtype, tokens, heads, inner + tail)
    weight = rounded(rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(inner)), dtype)
    results = []
    for eights in EIGHTS:
        out = gpu.empty((tokens + 2, heads * (rows + tail)), dtype)
        on_device = [out, gpu.array(x.astype(dtype)), gpu.array(weight.astype(dtype))]
        grid = (heads * product_chunks(rows, inner), -(-tokens // (8 * eights)))
        name = f"sm80_{TAG[dtype.name]}_head_linear_n{8 * eights}"
        gpu.launch(name, grid, 128, [*on_device, tokens, *shape, tail], product_smem(inner, eights))
        found = out.get().astype(np.float32)
        assert np.isnan(found[tokens:]).all(), "rows beyond the tokens were written"
        results.append(found[:tokens].reshape(tokens, heads, rows + tail))
    same_bits(f"head_linear {dtype}", results[1], results[0])
    same_bits("head_linear's tail", results[0][:, :, rows:], x[:, :, inner:])
    worst = error(results[0], head_linear(x, weight, Workers(1)))
    expect(f"head_linear {dtype} {shape}", worst, LIMIT[dtype.name] / 2)
    return worst


def check_prepare(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: Sizes, lens: list[int], interleaved: bool
) -> float:
    """latent_prepare against norm, rotation and product of the reference; the cache beside it untouched.

    lens: new tokens of each sequence; the last rows are padding that must not reach the cache.
    """
    starts = [int(rng.integers(0, 70)) for _ in lens]
    latents = Latents(gpu, rng, dtype, sizes, [s + n for s, n in zip(starts, lens, strict=True)])
    before = latents.cache.get().astype(np.float32)
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lens, strict=True)])
    owners, count, padded = np.repeat(np.arange(len(lens)), lens), sum(lens), sum(lens) + 3
    q = normal(rng, dtype, padded, sizes.heads, sizes.plain + sizes.rotated)
    kv = normal(rng, dtype, padded, sizes.width) * np.float32(3)
    kv, norm = rounded(kv, dtype), (1 + rng.standard_normal(sizes.rank) / 8).astype(np.float32)
    weight = rng.standard_normal((sizes.heads, sizes.rank, sizes.plain), np.float32)
    weight = rounded(weight / np.float32(np.sqrt(sizes.plain)), dtype)
    angles = rng.uniform(0, 6, (200, sizes.rotated // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)

    normed = rounded(ops.rms_norm(kv[:, : sizes.rank], norm, 1e-6), dtype)
    key, turned = kv[:count, None, sizes.rank :].copy(), q[:count].copy()
    for rows in (key, turned):
        rotate_last(rows, cos[positions], sin[positions], interleaved)
    wanted_q = head_linear(rounded(turned, dtype), weight, Workers(1))
    wanted_kv = np.concatenate([normed[:count], rounded(key[:, 0], dtype)], axis=1)

    results = []
    for eights in EIGHTS:
        out = gpu.empty((padded, sizes.heads * sizes.width), dtype)
        cache = gpu.array(before.astype(dtype))
        many = np.concatenate([positions, np.full(3, -9)]), np.concatenate([owners, np.full(3, -9)])
        rows = q.reshape(padded, -1).astype(dtype), kv.astype(dtype)
        if eights == 1:  # queries and latents in one row, as one product leaves them
            both = gpu.array(np.concatenate(rows, axis=1))
            given = both, ctypes.c_void_p(both.address + rows[0][0].nbytes)
            pitches = [both.shape[1]] * 2
        else:
            given, pitches = tuple(map(gpu.array, rows)), [r.shape[1] for r in rows]
        args = [out, *given, gpu.array(weight.astype(dtype)), cache, gpu.array(norm), gpu.array(cos),
                gpu.array(sin), latents.tables, *(gpu.array(a, np.int32) for a in many),
                gpu.array([count], np.int32), padded, *pitches, sizes.heads, sizes.rank, sizes.plain,
                sizes.rotated, latents.stride, 1e-6]  # fmt: skip
        grid = (sizes.heads * product_chunks(sizes.rank, sizes.plain) + eights, -(-padded // (8 * eights)))
        name = f"sm80_{TAG[dtype.name]}_latent_prepare{'_interleaved' if interleaved else ''}_n{8 * eights}"
        gpu.launch(name, grid, 128, args, product_smem(sizes.plain, eights))
        found = cache.get().astype(np.float32)
        at = latents.table[owners, positions // BLOCK], positions % BLOCK
        written = found[at]
        found[at] = before[at]
        assert np.array_equal(found, before, equal_nan=True), "other places of the cache were written"
        results.append((out.get().astype(np.float32)[:count], written))
    for first, second in zip(*results, strict=True):
        same_bits(f"prepare {dtype} {sizes}", second, first)
    out, written = results[0]
    worst = max(error(out, wanted_q.reshape(count, -1)), error(written, wanted_kv))
    expect(f"prepare {dtype} {sizes}", worst, LIMIT[dtype.name] / 2)
    return worst
