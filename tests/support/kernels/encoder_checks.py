"""Encoders' kernels, block-sparse attention and fused row kernels against the NumPy reference.

Runs on a GPU and in the emulator alike.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np

from rvllm.backends.cpu.reference import encoder as encode
from rvllm.backends.cpu.reference import moe, ops
from rvllm.backends.cpu.reference.attention import Scoring
from rvllm.backends.cuda.device.driver import TensorMap
from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.backends.cuda.ops.attention.plan import plan_decode, plan_prefill, prefill_tiles
from rvllm.backends.cuda.ops.encoder.plan import plan_text, text_tiles
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.kernels.attention.specs import sparse_kernel
from rvllm.kernels.encoder.specs import (
    HIDDEN_TOKENS,
    POOL_THREADS,
    POOLINGS,
    TEXT_HEAD_DIMS,
)
from rvllm.kernels.rowwise.specs import norm_add_norm_kernel, norm_kernel
from rvllm.program.dtypes import DType
from rvllm.program.ops.dense import BlockSparsity
from rvllm.program.rope import Rope
from support.kernels import attention_checks
from support.kernels.attention_checks import BLOCK, Cache, Shape, scale_of
from support.kernels.harness import BF16, SHORT, Gpu, error, expect, rounded

LIMIT = {"bfloat16": 3e-3, "float16": 4e-4}
ATTENTION_LIMIT = {"bfloat16": 8e-3, "float16": 1.5e-3}
LENGTHS = (1, 2, 63, 64, 65, 16, 130, 257)


def normal(rng: np.random.Generator, dtype: np.dtype, *shape: int) -> np.ndarray:
    return rounded(rng.standard_normal(shape, np.float32), dtype)


def offsets_of(lengths: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def attend_texts(
    gpu: Gpu,
    dtype: np.dtype,
    dim: int,
    heads: int,
    scale: float,
    texts: list[np.ndarray],
    spare: int = 3,
    capability: int = 80,
) -> list[np.ndarray]:
    """text_attention of texts [L, 3 * heads * dim], with blocks to spare and rows behind them.

    capability: of the GPU whose kernel it is to be.
    """
    lengths = tuple(len(t) for t in texts)
    plan = plan_text(dim, DType.parse(dtype.name), DeviceInfo(capability, gpu.facts.sm_count, 0))
    real = text_tiles(np.array(lengths, np.int32), plan.rows)
    tiles = np.full((len(real) + spare, 2), (-1, 0), np.int32)
    tiles[: len(real)] = real
    rows = np.full((sum(lengths) + 5, 3 * heads * dim), np.nan, np.float32)
    rows[: sum(lengths)] = np.concatenate(texts)
    out = gpu.empty((len(rows), heads * dim), dtype)
    qkv, listed = gpu.array(rows.astype(dtype)), [gpu.array(offsets_of(lengths)), gpu.array(tiles)]
    if plan.persistent:
        boxes = TensorMap.matrix(qkv.address, *rows.shape, 2 * rows.shape[1], 64, 64, dtype == BF16)
        args = [out, qkv, boxes, *listed, gpu.array([len(real)], np.int32), heads, scale]
        gpu.launch(plan.kernel, min(plan.persistent, len(real) * heads), plan.block, args, plan.smem)
    else:
        gpu.launch(plan.kernel, (len(tiles), heads), plan.block, [out, qkv, *listed, heads, scale], plan.smem)
    result = out.get().astype(np.float32)
    assert np.isnan(result[sum(lengths) :]).all(), "rows behind the texts were written"
    return np.split(result[: sum(lengths)], offsets_of(lengths)[1:-1])


def check_text_attention(
    gpu: Gpu, rng: np.random.Generator, dtype: np.dtype, dim: int, lengths: tuple[int, ...] = LENGTHS
) -> float:
    """Ragged texts against the reference, and each alone with the same bits."""
    heads, scale = 3, 1.3 * dim**-0.5
    texts = [normal(rng, dtype, n, 3 * heads * dim) for n in lengths]
    out = attend_texts(gpu, dtype, dim, heads, scale, texts)
    worst = 0.0
    for text, got in zip(texts, out, strict=True):
        worst = max(worst, error(got, encode.text_attention(text[None], heads, scale)[0]))
    for which in (len(lengths) - 1, 0, 4):
        (alone,) = attend_texts(gpu, dtype, dim, heads, scale, [texts[which]], spare=0)
        assert (alone.view(np.uint32) == out[which].view(np.uint32)).all(), "a text differs in company"
    expect(f"text attention d{dim} {dtype}", worst, ATTENTION_LIMIT[dtype.name])
    return worst


def check_text_attention_sm90(
    gpu: Gpu, rng: np.random.Generator, dtype: np.dtype, dim: int, lengths: tuple[int, ...] = LENGTHS
) -> None:
    """The bits of the kernel for every GPU, with one head and several, short texts and long ones."""
    for heads, of in ((3, lengths), (1, lengths[::-1]), (2, (1, 900, 17, 128, 129, 2000))):
        texts = [normal(rng, dtype, n, 3 * heads * dim) for n in of]
        wanted, got = (attend_texts(gpu, dtype, dim, heads, dim**-0.5, texts, capability=c) for c in (80, 90))
        for n, a, b in zip(of, wanted, got, strict=True):
            wrong = a.view(np.uint32) != b.view(np.uint32)
            assert not wrong.any(), f"{wrong.sum()} of {wrong.size} differ in a text of {n} tokens"


def check_positions(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """With and without kinds; rows beyond the count stay as they are."""
    worst = 0.0
    for width, offset, kinds in ((64, 0, True), (384, 2, False), (1032, 5, True)):
        x, table = normal(rng, dtype, 7, width), normal(rng, dtype, 40, width)
        kind = normal(rng, dtype, 2, width)
        at, which = (rng.integers(0, most, 7).astype(np.int32) for most in (40 - offset, 2))
        dx = gpu.array(x.astype(dtype))
        args = [dx, gpu.array(table.astype(dtype)), gpu.array(kind.astype(dtype)) if kinds else None,
                gpu.array(at), gpu.array(which), gpu.array([5], np.int32), width, offset]  # fmt: skip
        gpu.launch(f"sm80_{SHORT[dtype.name]}_add_positions", 7, 128, args)
        wanted = x + table[at + offset] + (kind[which] if kinds else 0)
        got = dx.get().astype(np.float32)
        worst = max(worst, error(got[:5], wanted[:5]))
        assert (got[5:] == x[5:]).all()
    expect("positions", worst, LIMIT[dtype.name])
    return worst


@dataclass
class Pooled:
    """The pool kernel over rows of x."""

    gpu: Gpu
    x: np.ndarray
    dtype: np.dtype

    def run(self, starts: np.ndarray, how: int, normalise: bool) -> np.ndarray:
        """Vectors of texts that begin at starts[:-1]; one more is planned than there are."""
        count, width = len(starts) - 1, self.x.shape[1]
        begin = np.concatenate([starts, starts[-1:]]).astype(np.int32)
        out = self.gpu.empty((count + 1, width), np.float32)
        args = [out, self.gpu.array(self.x.astype(self.dtype)), self.gpu.array(begin),
                self.gpu.array([count], np.int32), width, how, int(normalise)]  # fmt: skip
        self.gpu.launch(f"sm80_{SHORT[self.dtype.name]}_pool", count + 1, POOL_THREADS, args)
        result = out.get()
        assert np.isnan(result[count]).all(), "a vector beyond the count"
        return result[:count]


def check_pool(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Every way to pool, plain and normalised, narrow to wide; a text alone has the same bits."""
    worst = 0.0
    for width, lengths in ((48, (1, 7, 40)), (384, (1, 300, 5)), (1024, (9, 2)), (4104, (3, 6))):
        x = rounded(rng.standard_normal((sum(lengths), width), np.float32) + np.float32(0.1), dtype)
        pooled, starts = Pooled(gpu, x, dtype), offsets_of(lengths)
        for number, how in enumerate(POOLINGS):
            for normalise in (False, True):
                got = pooled.run(starts, number, normalise)
                for s, (a, b) in enumerate(itertools.pairwise(starts)):
                    worst = max(worst, error(got[s], encode.pool(x[a:b], how, normalise)))  # type: ignore[arg-type]
                assert (pooled.run(starts[-2:], number, normalise)[0] == got[-1]).all(), "differs in company"
    expect("pool", worst, 2e-6)
    return worst


def check_hide(gpu: Gpu, rng: np.random.Generator) -> None:
    """The listed ids and no others, in rows up to the count."""
    logits = rng.standard_normal((5, 1004)).astype(np.float32)
    ids = np.sort(rng.choice(1000, 90, replace=False)).astype(np.int32)
    device = gpu.array(logits)
    listed = (ctypes.c_int * HIDDEN_TOKENS)(*ids.tolist())
    gpu.launch("sm80_hide_tokens", 5, 128, [device, gpu.array([4], np.int32), 1004, len(ids), listed])
    wanted = logits.copy()
    wanted[:4, ids] = -np.inf
    assert (device.get() == wanted).all()


def check_clamped_gate(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """With a limit that clamps much, and without one."""
    worst = 0.0
    for limit in (0.8, None):
        x = normal(rng, dtype, 3, 2 * 1544)
        out = gpu.empty((3, 1544), dtype)
        args = [out, gpu.array(x.astype(dtype)), 1544, float(limit or 0.0), 1.702]
        gpu.launch(f"sm80_{SHORT[dtype.name]}_gated_clamped", (1, 3), 256, args)
        worst = max(worst, error(out.get(), moe.clamped_gate(x, limit, 1.702)))
    expect("clamped gate", worst, LIMIT[dtype.name])
    return worst


@dataclass
class Product:
    """One product on the sm_80 kernel, for its epilogues."""

    gpu: Gpu
    dtype: np.dtype
    x: np.ndarray
    packed: np.ndarray
    rows: int

    def run(self, kind: Kind, width: int, scale: float = 1.0, soft_cap: float = 0.0) -> np.ndarray:
        """Its result [tokens, width] as floats."""
        tokens, k = self.x.shape
        plan = gemm.variant(self.rows, k, tokens, SHORT[self.dtype.name], "sm80", 16, 132)
        out = self.gpu.empty((tokens, width), self.dtype)
        args = plan.arguments(
            self.gpu.array(self.x.astype(self.dtype)), self.gpu.array(self.packed), out, width,
            kind=kind, bias=None, residual=None, scale=scale, soft_cap=soft_cap, x_width=k, x_pitch=k,
        )  # type: ignore[arg-type]  # fmt: skip
        self.gpu.launch(plan.kernel, plan.grid, plan.block, args, plan.smem)
        return out.get().astype(np.float32)


def check_epilogues(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> int:
    """Activations and the clamped gate as a product's epilogue: the very bits of the separate kernels."""
    k, n, tokens, short = 72, 48, 5, SHORT[dtype.name]
    weight, x = normal(rng, dtype, n, k) / 8, normal(rng, dtype, tokens, k)
    plain = gemm.pack_matrix(weight.astype(dtype))
    product = Product(gpu, dtype, x, plain, n)
    sums = product.run(Kind.STORE, n)
    for act in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        fused = product.run(Kind[f"ACT_{act.upper()}"], n)
        out = gpu.empty((tokens, n), dtype)
        gpu.launch(f"sm80_{short}_act_{act}", (1, tokens), 256, [out, gpu.array(sums.astype(dtype)), n])
        assert (fused == out.get().astype(np.float32)).all(), act
        expect(act, error(fused, ops.activate(sums, act)), LIMIT[dtype.name])  # type: ignore[arg-type]
    half = n // 2
    both = gemm.pack_matrix(gemm.interleave_gate_up(weight[:half].astype(dtype), weight[half:].astype(dtype)))
    paired = Product(gpu, dtype, x, both, n)
    gates: list[tuple[Kind, str, list[object]]] = [
        (Kind.GATED_CLAMPED, "clamped", [0.5, 1.702]),
        (Kind.GATED_SILU, "silu", []),
        (Kind.GATED_GELU, "gelu", []),
        (Kind.GATED_GELU_TANH, "gelu_tanh", []),
    ]
    for kind, name, more in gates:
        fused = paired.run(kind, half, scale=1.702, soft_cap=0.5)
        out = gpu.empty((tokens, half), dtype)
        args = [out, gpu.array(sums.astype(dtype)), half, *more]
        gpu.launch(f"sm80_{short}_gated_{name}", (1, tokens), 256, args)
        assert (fused == out.get().astype(np.float32)).all(), name
    return 9


def check_norm_add_norm(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> int:
    """The bits of the norm, the add and the norm one after the other."""
    short, compared = SHORT[dtype.name], 0
    for width in (64, 2304, 16384):
        x, y = normal(rng, dtype, 3, width), normal(rng, dtype, 3, width) * 3
        before, after = rng.standard_normal((2, width), np.float32)
        dy, apart, fused = (gpu.array(a.astype(dtype)) for a in (y, x, x))
        out, normed, wanted = (gpu.empty((3, width), dtype) for _ in range(3))
        w, v = gpu.array(before), gpu.array(after)
        name, threads = norm_kernel(dtype.name, "rms", width, False)
        gpu.launch(name, 3, threads, [normed, dy, None, w, None, width, 1e-5, 1.0])
        name, threads = norm_kernel(dtype.name, "rms", width, True)
        gpu.launch(name, 3, threads, [wanted, apart, normed, v, None, width, 1e-6, 0.75])
        name, threads = norm_add_norm_kernel(dtype.name, width)
        gpu.launch(name, 3, threads, [out, fused, dy, w, v, width, 1e-5, 1e-6, 0.75])
        assert (fused.get().view(np.uint16) == apart.get().view(np.uint16)).all(), f"{short} {width}: stream"
        assert (out.get().view(np.uint16) == wanted.get().view(np.uint16)).all(), f"{short} {width}: norm"
        total = ops.add(x, rounded(ops.rms_norm(y, before, 1e-5), dtype), 0.75)
        expect("norm add", error(fused.get(), total), LIMIT[dtype.name])
        again = gpu.array(x.astype(dtype))
        gpu.launch(name, 3, threads, [None, again, dy, w, None, width, 1e-5, 0.0, 0.75])
        assert (again.get().view(np.uint16) == apart.get().view(np.uint16)).all(), (
            f"{short} {width}: no second"
        )
        compared += 3 * out.get().size
    return compared


def check_rope_normed(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> int:
    """The bits of two norms over heads and the rotation one after the other."""
    short, compared = SHORT[dtype.name], 0
    cases = [(128, 128, False, 7, 2, "rms", False), (64, 64, True, 3, 3, "layer", True),
             (160, 40, False, 2, 1, "layer", True), (256, 256, False, 1, 1, "rms", False),
             (80, 0, False, 2, 2, "rms", False)]  # fmt: skip
    for dim, rotated, interleaved, heads, kv, kind, each in cases:
        rows, count, slots, stride, blocks = 6, 5, 3, 4, 20
        pitch = (heads + 2 * kv) * dim
        qkv = normal(rng, dtype, rows, pitch)
        positions = rng.choice(stride * BLOCK, rows, replace=False).astype(np.int32)
        token_slots = rng.integers(0, slots, rows).astype(np.int32)
        tables = rng.permutation(blocks)[: slots * stride].reshape(slots, stride).astype(np.int32)
        cos, sin = (gpu.array(t) for t in Rope(dim=max(rotated, 4), theta=1e4).table(stride * BLOCK))
        weights = [rng.standard_normal(dim * (n if each else 1), np.float32) for n in (heads, kv)]
        q_weight, k_weight = (gpu.array(w) for w in weights)
        step, suffix = dim if each else 0, "_interleaved" if interleaved else ""
        where = [
            gpu.array(tables),
            gpu.array(positions),
            gpu.array(token_slots),
            gpu.array([count], np.int32),
        ]
        numbers = [pitch, stride, heads, kv, dim, rotated]
        grid = (-(-(heads + 2 * kv) // 4), rows)
        found = []
        for fused in (False, True):
            device = gpu.array(qkv.astype(dtype))
            caches = [gpu.empty((blocks, kv, BLOCK, dim), dtype) for _ in range(2)]
            args = [device, *caches, cos, sin, *where, *numbers]
            if fused:
                args += [q_weight, k_weight, step, step, 1e-6]
                gpu.launch(f"sm80_{short}_rope_kv_{kind}{suffix}", grid, 128, args)
            else:
                for weight, first, n in ((q_weight, 0, heads), (k_weight, heads, kv)):
                    norm = [device, weight, None, pitch, first * dim, n, dim, step, 1e-6]
                    gpu.launch(f"sm80_{short}_norm_groups_{kind}", (-(-n // 4), rows), 128, norm)
                gpu.launch(f"sm80_{short}_rope_kv{suffix}", grid, 128, args)
            queries = device.get()[:count, : heads * dim]
            found.append([queries, *(c.get() for c in caches)])
        for apart, together in zip(*found, strict=True):
            assert (apart.view(np.uint16) == together.view(np.uint16)).all(), f"{short} head {dim} {kind}"
            compared += apart.size
    return compared


class Sparse:
    """Block-sparse attention over a cache of the dense checks."""

    def __init__(self, gpu: Gpu, cache: Cache, sparsity: BlockSparsity) -> None:
        self.gpu, self.cache, self.shape, self.sparsity = gpu, cache, cache.shape, sparsity
        self.facts = [sparsity.size, sparsity.local, sparsity.stride, sparsity.head_step]

    def decode(self, q: np.ndarray, slots: np.ndarray, kv_lens: np.ndarray, blocks: int | None) -> np.ndarray:
        """As attention_checks.decode."""
        gpu, shape, cache = self.gpu, self.shape, self.cache
        plan = plan_decode(
            DType.parse(cache.dtype.name), shape.dim, shape.heads, shape.kv_heads, max_seqs=len(slots),
            max_model_len=max(cache.lens), num_blocks=10**9, sm_count=gpu.facts.sm_count,
            smem_per_block=gpu.facts.smem_per_block,
        )  # fmt: skip
        width = shape.heads * shape.dim
        out = gpu.empty((len(slots), width), cache.dtype)
        arrivals = gpu.zeros((plan.arrivals_bytes // 4,), np.int32)
        rows = gpu.array(q.reshape(len(slots), width).astype(cache.dtype))
        partial = gpu.empty((plan.partial_bytes // 4,), np.float32)
        args = [out, rows, cache.k_cache, cache.v_cache, cache.tables, gpu.array(slots, np.int32),
                gpu.array(kv_lens, np.int32), gpu.array([len(slots)], np.int32), partial, arrivals,
                *attention_checks.common(shape, cache, width, width), len(slots), *self.facts]  # fmt: skip
        gpu.launch(sparse_kernel(plan.kernel, shape.dim), blocks or plan.grid, plan.block, args, plan.smem)
        assert not arrivals.get().any(), "arrival counters are not back at zero"
        return out.get().reshape(len(slots), shape.heads, shape.dim).astype(np.float32)

    def prefill(
        self, q: list[np.ndarray], slots: np.ndarray, kv_lens: np.ndarray, small: bool
    ) -> list[np.ndarray]:
        """As attention_checks.prefill."""
        gpu, shape, cache = self.gpu, self.shape, self.cache
        plan = plan_prefill(
            DType.parse(cache.dtype.name), shape.dim,
            smem_per_block=101376 if small else gpu.facts.smem_per_block,
        )  # fmt: skip
        lens = np.array([len(x) for x in q], np.int32)
        starts = offsets_of(tuple(lens.tolist()))
        width = shape.heads * shape.dim
        rows = np.concatenate(q).reshape(-1, width).astype(cache.dtype)
        out = gpu.empty(rows.shape, cache.dtype)
        tiles = prefill_tiles(lens, kv_lens.astype(np.int32), 0, shape.group, plan.rows)
        args = [out, gpu.array(rows), cache.k_cache, cache.v_cache, cache.tables, gpu.array(slots, np.int32),
                gpu.array(kv_lens, np.int32), gpu.array(starts), gpu.array(tiles),
                *attention_checks.common(shape, cache, width, width), *self.facts]  # fmt: skip
        grid = (len(tiles), shape.kv_heads)
        gpu.launch(sparse_kernel(plan.kernel, shape.dim), grid, plan.block, args, plan.smem)
        parts = np.split(out.get().astype(np.float32), starts[1:-1])
        return [p.reshape(-1, shape.heads, shape.dim) for p in parts]

    def reference(self, slot: int, q: np.ndarray, start: int) -> np.ndarray:
        """Dense attention with the unseen keys hidden, written out."""
        shape, end = self.shape, start + len(q)
        k = np.repeat(self.cache.k[slot][:end], shape.group, axis=1)
        v = np.repeat(self.cache.v[slot][:end], shape.group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(scale_of(shape))
        scoring = Scoring(1.0, sparsity=self.sparsity, groups=(shape.kv_heads, shape.group))
        hidden = scoring.hidden(np.arange(end)[None], np.arange(start, end)[:, None])
        per_head = np.broadcast_to(hidden, (len(q), shape.kv_heads, shape.group, end))
        scores[per_head.reshape(len(q), shape.heads, end).transpose(1, 0, 2)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, v)


def check_sparse(
    gpu: Gpu,
    rng: np.random.Generator,
    dtype: np.dtype,
    shape: Shape,
    sparsity: BlockSparsity,
    length: int = 1300,
) -> float:
    """Against the reference; the same bits whole, in chunks, as decodes in a batch and alone."""
    cache = Cache(gpu, rng, dtype, shape, [length, length // 4])
    sparse = Sparse(gpu, cache, sparsity)
    q = attention_checks.queries(rng, dtype, length, shape)
    (whole,) = sparse.prefill([q], np.array([0]), np.array([length]), small=False)
    worst = error(whole, sparse.reference(0, q, 0))
    expect(f"block-sparse {dtype} {shape} {sparsity}", worst, ATTENTION_LIMIT[dtype.name])

    def same(out: np.ndarray, positions: slice | np.ndarray, what: str) -> None:
        wrong = np.argwhere(out.view(np.uint32) != whole[positions].view(np.uint32))
        assert not len(wrong), f"{what} {dtype} {shape}: {len(wrong)} elements differ, first at {wrong[0]}"

    other = attention_checks.queries(rng, dtype, length // 5, shape)
    cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
    for small in (False, True):
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            lens = np.array([length // 4, end])
            out = sparse.prefill([other, q[begin:end]], np.array([1, 0]), lens, small)
            same(out[1], slice(begin, end), f"chunk {begin}:{end}")
    special = [n for n in (0, 15, 63, 64, 255, 256, 511, 512, 1024) if n < length]
    positions = np.unique(np.concatenate([rng.choice(length, 12), special, [length - 1]]))
    zeros, ends = np.zeros(len(positions), np.int32), (positions + 1).astype(np.int32)
    for blocks in (None, int(rng.integers(1, 64))):
        same(sparse.decode(q[positions], zeros, ends, blocks), positions, "decodes in a batch")
    for p in (70, length - 1):
        one = sparse.decode(q[p : p + 1], np.zeros(1, np.int32), np.array([p + 1], np.int32), None)
        same(one, slice(p, p + 1), "a decode alone")
    return worst


SPARSE = [
    (Shape(128, 2, 4), BlockSparsity(64, 3, 5, 1)),
    (Shape(64, 1, 4), BlockSparsity(16, 2, 4, 1)),
    (Shape(64, 2, 3), BlockSparsity(128, 1, 3, 0)),
    (Shape(128, 1, 20), BlockSparsity(64, 2, 8, 1)),
]
ROW_CHECKS = [
    check_positions, check_pool, check_clamped_gate, check_epilogues, check_norm_add_norm, check_rope_normed,
]  # fmt: skip

__all__ = ["ROW_CHECKS", "SPARSE", "TEXT_HEAD_DIMS", "check_hide", "check_sparse", "check_text_attention"]
