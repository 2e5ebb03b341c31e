"""Kernels of Mamba-2 layers against the NumPy reference, and against themselves: the same bits however cut.

A check runs some sequences three times: each alone in one step; all in company, in random pieces; all token
by token, as decoding does. The first must equal the reference, the others the first, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rvllm.backends.cpu.reference import mamba2 as recurrent
from rvllm.backends.cpu.reference import ops
from rvllm.backends.cuda.ops.mamba2 import ConvAt
from rvllm.kernels.mamba2.specs import (
    SCAN_TAPS,
    conv_kernel,
    gated_norm_kernel,
    scan_kernel,
    scan_smem,
)
from rvllm.program.ops.mamba2 import CHUNK, CausalConv, StateScan
from support.kernels.harness import SHORT, Array, Machine, error, expect, rounded

LIMIT = {"bfloat16": 3e-3, "float16": 4e-4}
SCAN_LIMIT = {"bfloat16": 2.3e-3, "float16": 3e-4}  # hardly more than the rounding of outputs
STATE_LIMIT = 1e-5  # of the state, which is float32
Part = tuple[int, int, int]  # sequence, its first position in the step, tokens
SLOTS = 7


@dataclass(frozen=True)
class ScanShape:
    """Dimensions of a scan."""

    heads: int
    dim: int
    groups: int
    size: int


SCANS = [
    ScanShape(4, 32, 2, 64),
    ScanShape(2, 64, 1, 128),
    ScanShape(3, 80, 3, 128),
    ScanShape(2, 16, 2, 256),
    ScanShape(2, 128, 1, 64),
]
LENGTHS = (1, 16, 37, 50, 15)


class Meta:
    """The metadata arrays of a step; poison beyond what is in use."""

    def __init__(self, gpu: Machine, parts: Sequence[Part], slots: np.ndarray) -> None:
        def padded(values: Sequence[int] | np.ndarray, more: int = 3) -> Array:
            return gpu.array(np.concatenate([np.asarray(values, np.int32), np.full(more, -1, np.int32)]))

        self.lengths = np.array([n for _, _, n in parts])
        self.tokens, self.seqs = int(self.lengths.sum()), len(parts)
        self.header = padded([self.tokens, self.seqs], 14)
        self.count = gpu.array([self.seqs], np.int32)
        self.positions = padded(np.concatenate([np.arange(at, at + n) for _, at, n in parts]))
        own = np.array([slots[seq] for seq, _, _ in parts])
        self.token_slots = padded(np.repeat(own, self.lengths))
        self.seq_slots = padded(own)
        self.kv_lens = padded([at + n for _, at, n in parts])
        self.offsets = padded(np.concatenate([[0], np.cumsum(self.lengths)]))


def cuts(rng: np.random.Generator, lengths: Sequence[int], how: str) -> Iterator[list[Part]]:
    """The steps of a run: `alone`, `company` or `ones`."""
    at = [0] * len(lengths)
    if how == "alone":
        yield from ([(seq, 0, n)] for seq, n in enumerate(lengths))
        return
    while any(a < n for a, n in zip(at, lengths, strict=True)):
        parts = []
        for seq in rng.permutation(len(lengths)).tolist():
            left = lengths[seq] - at[seq]
            if not left or (how == "company" and rng.random() < 0.2):
                continue
            n = 1 if how == "ones" else min(left, int(rng.choice([1, 1, 2, 3, 9, 16, 21])))
            parts.append((seq, at[seq], n))
            at[seq] += n
        if parts:
            yield parts


def gathered(parts: Sequence[Part], rows: Sequence[np.ndarray], more: int) -> np.ndarray:
    """The step's rows of each sequence's [L, width], then `more` of NaN."""
    found = [rows[seq][at : at + n] for seq, at, n in parts]
    return np.concatenate([*found, np.full((more, rows[0].shape[1]), np.nan, rows[0].dtype)])


def run_in_pieces(
    gpu: Machine,
    rng: np.random.Generator,
    lengths: Sequence[int],
    width: int,
    dtype: np.dtype,
    elements: int,
    launch: Callable[[Meta, Sequence[Part], Array, Array, str], None],
) -> tuple[list[np.ndarray], np.ndarray]:
    """Outputs [L, width] of each sequence, the same however it is cut, and its slot's state at the end."""
    first, states = list[np.ndarray](), np.zeros(0)
    for how in ("alone", "company", "ones"):
        slots = rng.permutation(SLOTS)[: len(lengths)]
        state = gpu.empty((SLOTS, elements), np.float32)
        found = [np.zeros((n, width), dtype) for n in lengths]
        for parts in cuts(rng, lengths, how):
            meta = Meta(gpu, parts, slots)
            out = gpu.empty((meta.tokens + 2, width), dtype)
            launch(meta, parts, out, state, how)
            result, row = out.get(), 0
            for seq, at, n in parts:
                found[seq][at : at + n] = result[row : row + n]
                row += n
            assert np.isnan(result[row:].astype(np.float32)).all(), "rows beyond the step were written"
        unused = np.setdiff1d(np.arange(SLOTS), slots)
        states = state.get()
        assert np.isnan(states[unused]).all(), "a slot of no sequence was written"
        first = first or found
        for seq, (a, b) in enumerate(zip(first, found, strict=True)):
            same = (a.view(np.uint16) == b.view(np.uint16)).all(axis=1)
            assert same.all(), f"{how}: sequence {seq} differs from token {int(np.argmin(same))} on"
    return first, states[slots]


def check_conv(
    gpu: Machine, rng: np.random.Generator, dtype: np.dtype, taps: int, act: str, width: int = 136
) -> float:
    """Every number of taps, columns inside a wider row, with and without bias, tiles of 1 to 8 rows."""
    start, pitch, worst = 24, 24 + width + 16, 0.0
    weight = rng.standard_normal((width, taps), np.float32)
    bias = rng.standard_normal(width, np.float32) if taps != 3 else None
    rows = [rounded(rng.standard_normal((n, pitch), np.float32), dtype).astype(dtype) for n in LENGTHS]
    elements = CausalConv.elements(width, taps)
    weights = [gpu.array(weight), gpu.array(bias) if bias is not None else None]

    def launch(meta: Meta, parts: Sequence[Part], out: Array, state: Array, how: str) -> None:
        tile = 1 if how == "ones" else int(rng.choice([1, 2, 5, 8]))
        x = gpu.array(np.roll(gathered(parts, rows, 2), -start, axis=1))  # convolved columns come first
        args = [out, x, *weights, state, meta.header, meta.positions, meta.token_slots, meta.offsets,
                width, pitch, elements, tile]  # fmt: skip
        grid = (-(-width // 8 // 32), -(-(meta.tokens + 2) // tile))
        gpu.launch(conv_kernel(dtype.name, taps, act), grid, 32, args)

    found, _ = run_in_pieces(gpu, rng, LENGTHS, width, dtype, elements, launch)
    for x, y in zip(rows, found, strict=True):
        wanted = convolved(x[:, start : start + width].astype(np.float32), weight, bias, act)
        worst = max(worst, error(y, wanted))
    expect("conv", worst, LIMIT[dtype.name])
    return worst


def scanned(
    xbc: np.ndarray, raw: np.ndarray, shape: ScanShape, weights: Sequence[np.ndarray], floor: float
) -> tuple[np.ndarray, np.ndarray]:
    """The reference: outputs [L, heads * dim] and the state after them, from inputs and raw steps."""
    heads, dim, groups, size = shape.heads, shape.dim, shape.groups, shape.size
    log_decay, skip, bias = weights
    x, b, c = np.split(xbc, [heads * dim, heads * dim + groups * size], axis=1)
    y, h = recurrent.scan(
        x.reshape(-1, heads, dim),
        np.maximum(recurrent.softplus(raw + bias), np.float32(floor)),
        b.reshape(-1, groups, size),
        c.reshape(-1, groups, size),
        -np.exp(log_decay),
        skip,
        np.zeros((heads, dim, size), np.float32),
    )
    return y.reshape(len(x), heads * dim), h


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, act: str) -> np.ndarray:
    """The reference: one sequence's [L, width] from its inputs, in float32."""
    taps = weight.shape[1]
    whole = np.concatenate([np.zeros((taps - 1, x.shape[1])), x.astype(np.float64)])
    total = sum(whole[j : j + len(x)] * weight[:, j] for j in range(taps))
    return ops.activate((total + (0 if bias is None else bias)).astype(np.float32), act)


def check_scan(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, shape: ScanShape) -> float:
    """Slow and fast decays, steps at the floor and above; the time steps lie inside a wider row."""
    heads, dim, groups, size = shape.heads, shape.dim, shape.groups, shape.size
    inner, wide, first, floor = heads * dim, heads * dim + 2 * groups * size, 5, 0.01
    log_decay = np.log(np.linspace(0.05, 12.0, heads)).astype(np.float32)
    skip, bias = rng.standard_normal((2, heads), np.float32)
    bias -= 3
    xbc = [rounded(rng.standard_normal((n, wide), np.float32), dtype).astype(dtype) for n in LENGTHS]
    raw = [
        rounded(2 * rng.standard_normal((n, heads + 11), np.float32), dtype).astype(dtype) for n in LENGTHS
    ]
    elements = StateScan.elements(heads, dim, groups, size)
    weights = [gpu.array(v) for v in (log_decay, skip, bias)]

    def launch(meta: Meta, parts: Sequence[Part], out: Array, state: Array, how: str) -> None:
        x = gpu.array(gathered(parts, xbc, 2))
        steps = gpu.array(np.roll(gathered(parts, raw, 2), -first, axis=1))  # the heads' columns come first
        keep = bool((meta.lengths == 1).all())
        sequences = [state, meta.count, meta.seq_slots, meta.kv_lens, meta.offsets]
        numbers = [elements, heads + 11, heads, dim, groups]
        args = [out, x, steps, *weights, *sequences, *numbers, floor, int(keep), ConvAt()]
        blocks = meta.seqs + 1 if how == "ones" else int(rng.integers(1, meta.seqs + 2))
        smem = scan_smem(dim, size)
        gpu.launch(scan_kernel(dtype.name, dim, size), (heads, blocks), 2 * dim, args, smem=smem)
        if not keep:
            args = [x, steps, *sequences, *numbers, size]
            gpu.launch(f"sm80_{SHORT[dtype.name]}_scan_keep", (2, blocks), 64, args)

    found, states = run_in_pieces(gpu, rng, LENGTHS, inner, dtype, elements, launch)
    worst = 0.0
    for seq in range(len(LENGTHS)):
        inputs = xbc[seq].astype(np.float32), raw[seq][:, first : first + heads].astype(np.float32)
        y, _ = scanned(*inputs, shape, (log_decay, skip, bias), floor)
        worst = max(worst, error(found[seq], y))
        whole = len(inputs[0]) // CHUNK * CHUNK
        if whole:
            _, h = scanned(*(i[:whole] for i in inputs), shape, (log_decay, skip, bias), floor)
            expect("state", error(states[seq][: h.size], h.reshape(-1)), STATE_LIMIT)
    assert max(LENGTHS) > 3 * CHUNK
    expect("scan", worst, SCAN_LIMIT[dtype.name])
    return worst


def check_fused_conv(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, shape: ScanShape) -> None:
    """Decoding with the convolution inside the scan: the bits and the states of two launches."""
    heads, dim, groups, size = shape.heads, shape.dim, shape.groups, shape.size
    inner, wide = heads * dim, heads * dim + 2 * groups * size
    pitch = -(-(wide + heads) // 8) * 8 + 8
    lengths, slots = (1, 19, 34), np.array([5, 0, 3])
    sizes = CausalConv.elements(wide, SCAN_TAPS), StateScan.elements(heads, dim, groups, size)
    rows = [rounded(rng.standard_normal((n, pitch), np.float32), dtype).astype(dtype) for n in lengths]
    taps, bias = gpu.array(rng.standard_normal((wide, SCAN_TAPS), np.float32)), None
    if heads % 2:
        bias = gpu.array(rng.standard_normal(wide, np.float32))
    vectors = [gpu.array(rng.standard_normal(heads).astype(np.float32)) for _ in range(3)]
    states = [[gpu.empty((SLOTS, n), np.float32) for n in sizes] for _ in range(2)]
    smem, numbers = scan_smem(dim, size), [sizes[1], pitch, heads, dim, groups]
    for parts in cuts(rng, lengths, "ones"):
        meta, both = Meta(gpu, parts, slots), gathered(parts, rows, 2)
        x, steps = gpu.array(both), gpu.array(np.roll(both, -wide, axis=1))
        found = []
        for fused, (inputs, state) in enumerate(states):
            xbc = gpu.empty((meta.tokens + 2, wide), dtype)
            out = gpu.empty((meta.tokens + 2, inner), dtype)
            conv = ConvAt()
            if fused:
                where = taps.address, bias.address if bias else None, inputs.address
                conv = ConvAt(x.address, *where, pitch, sizes[0])
            else:
                grid = (-(-wide // 8 // 64), meta.tokens + 2)
                args = [xbc, x, taps, bias, inputs, meta.header, meta.positions, meta.token_slots,
                        meta.offsets, wide, pitch, sizes[0], 1]  # fmt: skip
                gpu.launch(conv_kernel(dtype.name, SCAN_TAPS, "silu"), grid, 64, args)
            args = [out, xbc, steps, *vectors, state, meta.count, meta.seq_slots, meta.kv_lens, meta.offsets,
                    *numbers, 0.01, 1, conv]  # fmt: skip
            kernel = scan_kernel(dtype.name, dim, size, conv=bool(fused))
            gpu.launch(kernel, (heads, meta.seqs + 1), 2 * dim, args, smem=smem)
            found.append(out.get())
        assert np.array_equal(*(f.view(np.uint16) for f in found)), parts
        assert not np.isnan(found[0][: meta.tokens].astype(np.float32)).any()
    for two, one in zip(*states, strict=True):
        assert np.array_equal(two.get().view(np.uint32), one.get().view(np.uint32)), "states differ"


def check_gated_norm(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Groups of 8 to 1280 columns; the gate is the first columns of a wider row."""
    worst = 0.0
    for group, groups in ((8, 3), (136, 2), (512, 8), (1280, 2)):
        width, pitch = group * groups, group * groups + 72
        x, gate = (rounded(rng.standard_normal((3, n), np.float32) * 2, dtype) for n in (width, pitch))
        weight = rng.standard_normal(width, np.float32)
        out = gpu.empty((3, width), dtype)
        kernel, threads = gated_norm_kernel(dtype.name, group)
        arrays = [gpu.array(x.astype(dtype)), gpu.array(gate.astype(dtype)), gpu.array(weight)]
        args = [out, *arrays, width, pitch, group, 1e-5]
        gpu.launch(kernel, (groups, 3), threads, args)
        gated = (x * ops.silu(gate[:, :width])).reshape(3, groups, group)
        reference = ops.rms_norm(gated, weight.reshape(groups, group), 1e-5).reshape(3, width)
        worst = max(worst, error(out.get(), reference))
    expect("gated norm", worst, LIMIT[dtype.name])
    return worst
