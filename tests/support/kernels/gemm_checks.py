"""Packing and the sm_80 matrix kernels: right, complete, nothing outside, the same bits in any batch."""

from __future__ import annotations

import ctypes

import numpy as np

from rvllm.backends.base import SamplingSpec
from rvllm.backends.cpu.reference.philox import gumbel, noise_words, philox4x32
from rvllm.backends.cuda.layout.metadata import BEST_ONLY, HEADER_WORDS, NUM_SAMPLES, SAMPLE_SLOTS, SLOTS
from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.backends.cuda.ops.gemm import sm80
from rvllm.backends.cuda.ops.gemm.common import Kind
from rvllm.backends.cuda.ops.sampling.slots import DRAW, SLOT
from rvllm.kernels.gemm.specs import MMA_TILES
from support.kernels.harness import BF16, F16, SHORT, Machine, error, expect, rounded

Way = tuple[gemm.Mode, int]  # a mode and its token tile
PLAIN: Way = ("sm80", 16)  # sums all of K of any weight in one block
CAPABILITIES = (80, 86)  # rings of 163 and of 99 KB
SMS = (1, 4, 132)  # the more there are, the deeper the rings of a small product
SHAPES = [(203, 72), (64, 8), (320, 576), (130, 1160)]  # (rows, columns) of the weight
GUARD = 5  # poisoned rows behind the output
STEP = 3  # of output, whose noise is looked at
POISON = {2: np.uint16, 4: np.uint32}


def ways_of(n: int, k: int) -> list[Way]:
    """Every way of the kernel that can sum a weight of this shape."""
    tiles = [(tile, split) for row in MMA_TILES.values() for tile in row for split in (False, True)]
    ways = [sm80.Way(*tile) for tile in tiles]
    return [
        gemm.way_named(f"{way.mode}:{way.tile.tokens}")
        for way in ways
        if sm80.can_run(way, gemm.segments_of(n, k))
    ]


class Product:
    """A packed weight [n, k] and inputs, on the machine."""

    def __init__(
        self, gpu: Machine, rng: np.random.Generator, dtype: np.dtype, n: int, k: int, most: int
    ) -> None:
        self.gpu, self.dtype, self.n, self.k, self.rng = gpu, dtype, n, k, rng
        self.x = rounded(rng.standard_normal((most, k), np.float32), dtype)
        self.weight = rounded(rng.standard_normal((n, k), np.float32) / np.float32(k**0.5), dtype)
        self.packed = gpu.array(gemm.pack_matrix(self.weight.astype(dtype)))

    def _launch(self, tokens: int, way: Way, out: object, pitch: int, **options: object) -> None:
        """One launch with the ring of some card; the counters of a split product are zero again after it."""
        capability, sms = int(self.rng.choice(CAPABILITIES)), int(self.rng.choice(SMS))
        plan = gemm.variant(self.n, self.k, tokens, SHORT[self.dtype.name], *way, sms, capability=capability)
        counters = self.gpu.zeros((sm80.MAX_SPLIT_TILES if plan.partials else 1,), np.int32)
        partials = self.gpu.empty((max(16, plan.partials),), np.uint8)
        if plan.partials:
            partials.put(
                np.concatenate([counters.get().view(np.uint8), partials.get()[4 * sm80.MAX_SPLIT_TILES :]])
            )
        x = self.gpu.array(self.x[:tokens].astype(self.dtype))
        args = plan.arguments(
            x, self.packed, out, pitch, x_width=self.k, x_pitch=self.k,
            partials=partials if plan.partials else None, **options,
        )  # fmt: skip
        args = [None if isinstance(a, int) and a == 0 else a for a in args]
        self.gpu.launch(plan.kernel, plan.grid, plan.block, args, plan.smem)
        if plan.partials:
            assert not partials.get()[: 4 * sm80.MAX_SPLIT_TILES].any(), (
                "counters are left for the next launch"
            )

    def run(
        self, tokens: int, way: Way, kind: Kind, width: int | None = None, **options: object
    ) -> np.ndarray:
        """Outputs [tokens, width] as float32 (LOGITS) or rounded; what lies behind them is left alone."""
        gpu, width = self.gpu, width or self.n
        pitch = width + 4 * (width % 8 == 0)
        out_type = np.dtype(np.float32) if kind == Kind.LOGITS else self.dtype
        out = gpu.empty((tokens + GUARD, pitch), out_type)
        residual = options.pop("residual", None)
        if residual is not None:
            given = out.get()
            given[:tokens, :width] = residual
            out.put(given)
            options["residual"] = out
        self._launch(tokens, way, out, pitch, kind=kind, **options)
        result = out.get()
        raw = result.view(POISON[out_type.itemsize])
        poison = np.iinfo(raw.dtype).max
        assert (raw[tokens:] == poison).all() and (raw[:, width:] == poison).all(), "wrote outside its rows"
        assert not (raw[:tokens, :width] == poison).any(), "left elements unwritten"
        return result[:tokens, :width]

    def best(self, tokens: int, way: Way, flag: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
        """The (logit, id) of every 64 logits, where `flag` says that the best is wanted: [tokens, tiles]."""
        pitch, tiles = -(-self.n // 8) * 8, -(-self.n // 64)
        out = self.gpu.empty((tokens + GUARD, pitch), np.float32)
        self._launch(tokens, way, out, pitch, kind=Kind.LOGITS, residual=flag, **options)
        raw = out.get().view(np.uint32)
        assert (raw[tokens:] == 2**32 - 1).all() and (raw[:, 2 * tiles :] == 2**32 - 1).all(), "wrote outside"
        pairs = raw[:tokens, : 2 * tiles].reshape(tokens, tiles, 2)
        return pairs[..., 0].view(np.float32), pairs[..., 1].view(np.int32)


def check_gemm(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, sizes: tuple[int, ...] = (1, 7, 16, 33, 70, 135)
) -> float:
    """Sums against float64, with the same bits at every size by every way, and what becomes of them."""
    worst = 0.0
    for n, k in SHAPES:
        product = Product(gpu, rng, dtype, n, k, max(sizes))
        exact = product.x.astype(np.float64) @ product.weight.astype(np.float64).T
        sums = product.run(max(sizes), PLAIN, Kind.LOGITS)
        worst = max(worst, error(sums, exact))
        for way in ways_of(n, k):
            for tokens in (int(rng.choice(sizes[:-1])), sizes[-1]):
                again = product.run(tokens, way, Kind.LOGITS)
                assert (again.view(np.uint32) == sums[:tokens].view(np.uint32)).all(), (n, k, tokens, way)
            _check_ends(product, sums, way)
        if k == 8:  # token tiles that no longer fit beside each other
            many = Product(gpu, rng, dtype, n, k, 1050)
            first = many.run(1050, PLAIN, Kind.LOGITS)
            for way in ways_of(n, k):
                assert (first.view(np.uint32) == many.run(1050, way, Kind.LOGITS).view(np.uint32)).all(), way
            worst = max(worst, error(first, many.x.astype(np.float64) @ many.weight.astype(np.float64).T))
        capped = product.run(9, PLAIN, Kind.LOGITS, scale=0.5, soft_cap=3.0)
        worst = max(worst, error(capped, 3 * np.tanh(sums[:9].astype(np.float64) * 0.5 / 3)))
    expect("gemm", worst, 2e-5)
    return worst


def _check_ends(product: Product, sums: np.ndarray, way: Way) -> None:
    """Rounding, bias, residual and gate, which follow from the sums."""
    rng, dtype, n, tokens = product.rng, product.dtype, product.n, 9
    row = sums[:tokens]
    bias = rounded(rng.standard_normal(n, np.float32), dtype)
    residual = rounded(rng.standard_normal((tokens, n), np.float32), dtype)
    biased = product.gpu.array(bias.astype(dtype))
    found = product.run(tokens, way, Kind.STORE, bias=biased, residual=residual)
    assert (found == (residual + rounded(row + bias, dtype)).astype(dtype)).all(), way
    if n % 16 == 0:
        halves = rounded(row, dtype).reshape(tokens, n // 16, 2, 8)
        gate, up = (halves[:, :, half].reshape(tokens, -1) for half in (0, 1))
        found = product.run(tokens, way, Kind.GATED_SILU, width=n // 2)
        wanted = gate / (1 + np.exp(-gate.astype(np.float64))) * up
        tolerance = 2.0**-7 if dtype == BF16 else 2.0**-10
        assert np.allclose(found.astype(np.float64), wanted, rtol=tolerance, atol=1e-6), way


def check_best(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Where the best alone is asked for, each row begins with the (logit, id) of every 64 of its logits."""
    tokens, flag = 37, gpu.array([1], np.int32)
    for n, k in SHAPES[:3]:
        product = Product(gpu, rng, dtype, n, k, tokens)
        product.x[5] = 0  # all equal: the lowest id
        for options in ({}, {"bias": gpu.array(rng.standard_normal(n).astype(dtype)), "soft_cap": 3.0}):
            logits = product.run(tokens, PLAIN, Kind.LOGITS, **options)
            for way in ways_of(n, k):
                values, ids = product.best(tokens, way, flag, **options)
                for i, first in enumerate(range(0, n, 64)):
                    part = logits[:, first : first + 64]
                    assert (ids[:, i] == first + part.argmax(axis=1)).all(), (n, k, way, i)
                    assert (values[:, i] == part.max(axis=1)).all()


def draw_header(
    gpu: Machine, rng: np.random.Generator, tokens: int
) -> tuple[object, object, list[SamplingSpec]]:
    """(a step's header whose rows draw, the slots it names, the rows' parameters); some rows are greedy."""
    seeds = [int(seed) for seed in rng.integers(2**63, size=tokens)]
    specs = [SamplingSpec(temperature=(0.0, 0.6, 1.0, 1.7)[i % 4], seed=seed) for i, seed in enumerate(seeds)]
    place = rng.permutation(tokens)
    slots = np.zeros(tokens, SLOT)
    slots["temperature"][place] = [spec.temperature for spec in specs]
    slots["noise"][place] = [philox4x32(spec.seed, STEP)[1:3] for spec in specs]
    kept = gpu.array(slots)
    header = np.zeros(HEADER_WORDS + tokens, np.int32)
    header[NUM_SAMPLES], header[BEST_ONLY], header[SAMPLE_SLOTS] = tokens - 1, DRAW, HEADER_WORDS
    header[SLOTS : SLOTS + 2].view(np.int64)[0] = kept.address
    header[HEADER_WORDS:] = place
    header[-2] = -1  # draws nothing; the last row is none of the step's
    specs[-2:] = [SamplingSpec()] * 2
    return gpu.array(header), kept, specs


def check_drawn(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Where rows draw by temperature, the best is that of logit / temperature + the row's noise."""
    tokens = 21
    header, _slots, specs = draw_header(gpu, rng, tokens)
    for n, k in SHAPES[:3]:
        product = Product(gpu, rng, dtype, n, k, tokens)
        logits = product.run(tokens, PLAIN, Kind.LOGITS)
        sums = logits.astype(np.float64)
        for row, spec in enumerate(specs):
            if spec.temperature:
                sums[row] = sums[row] / spec.temperature + gumbel(noise_words(spec.seed, STEP, n))
        first = None
        for way in ways_of(n, k):
            values, ids = product.best(tokens, way, ctypes.c_void_p(header.address + 4 * BEST_ONLY))
            first = first or (values, ids)
            assert (values.view(np.uint32) == first[0].view(np.uint32)).all() and (ids == first[1]).all()
            for i, start in enumerate(range(0, n, 64)):
                part = sums[:, start : start + 64]
                taken = np.take_along_axis(sums, ids[:, i : i + 1], axis=1)[:, 0]
                assert (np.abs(values[:, i] - taken) < 1e-4).all(), (n, k, way, i)
                assert (taken >= part.max(axis=1) - 1e-4).all(), (n, k, way, i)


def check_pack(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> int:
    """The pack kernels against pack_matrix, bit for bit: every source type, transposed, gates and ups."""
    compared = 0
    short = SHORT[dtype.name]
    for source in (np.dtype(np.float32), BF16, F16):
        name = f"sm80_{short}_gemm_pack_{SHORT[source.name]}"
        for n, k in ((203, 72), (64, 200)):
            weight = rng.standard_normal((n, k), np.float32).astype(source)
            wanted = gemm.pack_matrix(weight.astype(dtype))
            for transposed in (False, True):
                stored = gpu.array(np.ascontiguousarray(weight.T) if transposed else weight)
                strides = {"row_stride": 1, "column_stride": n} if transposed else {}
                out = gpu.empty(wanted.shape, np.uint8)
                args = gemm.pack_arguments(stored, out, n, k, padded_rows=-(-n // 64) * 64, **strides)
                gpu.launch(name, 3, 64, args)
                assert (out.get() == wanted).all(), (name, n, k, transposed)
                compared += wanted.size
        gate, up = (rng.standard_normal((64, 72), np.float32).astype(source) for _ in range(2))
        wanted = gemm.pack_matrix(gemm.interleave_gate_up(gate.astype(dtype), up.astype(dtype)))
        out = gpu.empty(wanted.shape, np.uint8)
        for values, kind in ((gate, gemm.Interleave.GATE), (up, gemm.Interleave.UP)):
            gpu.launch(name, 5, 96, gemm.pack_arguments(gpu.array(values), out, 64, 72, interleave=kind))
        assert (out.get() == wanted).all()
        compared += wanted.size
    return compared
