"""Integer weights: packing on the device and the sm_80 kernels, against the NumPy reference."""

from __future__ import annotations

import ctypes

import numpy as np

from rvllm.backends.cuda.ops.gemm import integer
from rvllm.kernels.gemm.integer.specs import (
    CHUNK,
    GGUF_LAYOUTS,
    LAYOUTS,
    SM80_TOKENS,
    IntegerLayout,
    sm80_smem,
)
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.blocks import FP4_TABLE, NORMAL_TABLE, levels_into, scales_of
from support.kernels.harness import SHORT, Machine, error, expect, rounded

SHAPES = [(203, 72), (64, 8), (130, 1160)]  # (rows, columns) of the weight
GUARD = 3  # poisoned rows behind the output
HALVES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108],
          "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": []}  # fmt: skip
ZEROS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q6_K": 32, "Q3_K": 4}


def half_words(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two float16 in a word, the first in the low half."""
    both = [
        np.ascontiguousarray(a.astype(np.float16) + np.float16(0)).view(np.uint16).astype(np.uint32)
        for a in (low, high)
    ]
    return both[0] | both[1] << 16


def random_matrix(
    rng: np.random.Generator, layout: IntegerLayout, n: int, k: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Levels [n, k] and words of scales [n, runs]."""
    levels = rng.integers(0, 1 << layout.bits, (n, k), dtype=np.uint8)
    shape = (n, -(-k // layout.run))
    scale = rng.uniform(0.5, 1.5, shape) * 2.0 ** (1 - layout.bits) * k**-0.5
    if layout.integers:
        zero = rng.integers(0, (1 << layout.bits) + 1, shape)
        if layout.bits == 8:
            return levels, half_words(scale, zero)
        magic = {"bfloat16": 0x4300, "float16": 0x6400}[dtype.name]
        return levels, half_words(scale, scale) & 0xFFFF | (zero + magic).astype(np.uint32) << 16
    other = -scale if layout.pairs else scale * rng.uniform(0, 1 << (layout.bits - 1), shape)
    return levels, half_words(scale, other)


def check_products(
    gpu: Machine,
    rng: np.random.Generator,
    dtype: np.dtype,
    name: str,
    sizes: tuple[int, ...] = (1, 7, 33, 70),
) -> float:
    """Sums of the sm_80 kernels against float64, with the same bits at every size, and nothing outside."""
    layout, worst = LAYOUTS[name], 0.0
    for n, k in SHAPES:
        levels, words = random_matrix(rng, layout, n, k, dtype)
        weight = integer.multiplied(levels, words, layout, dtype).astype(np.float64)
        x = rounded(rng.standard_normal((max(sizes), k), np.float32), dtype)
        packed = gpu.array(integer.pack_levels(levels, words, layout))
        first = None
        for tokens in sorted(sizes, reverse=True):
            for tile in SM80_TOKENS:
                out = gpu.empty((tokens + GUARD, n), np.dtype(np.float32))
                plan = integer.variant(n, k, tokens, SHORT[dtype.name], layout, "sm80", tile, 132)
                args = plan.arguments(
                    gpu.array(x[:tokens].astype(dtype)), packed, out, n, kind=1, x_width=k, x_pitch=k
                )
                args = [None if isinstance(a, int) and a == 0 else a for a in args]
                gpu.launch(plan.kernel, plan.grid, plan.block, args, sm80_smem(layout, tile))
                found = out.get()
                assert (found[tokens:].view(np.uint32) == 0xFFFFFFFF).all(), "wrote outside its rows"
                first = found[:tokens] if first is None else first
                assert (found[:tokens].view(np.uint32) == first[:tokens].view(np.uint32)).all(), (
                    n,
                    k,
                    tokens,
                    tile,
                )
        worst = max(worst, error(first, x.astype(np.float64) @ weight.T))
    expect(f"integer {name}", worst, 2e-5)
    return worst


def stored_blocks(rng: np.random.Generator, kind: str, rows: int, k: int) -> np.ndarray:
    """Random blocks with finite scales, [rows, bytes of a row]."""
    elements, nbytes = TensorType[kind].block
    raw = rng.integers(0, 256, (rows * k // elements, nbytes), dtype=np.uint8)
    most = 100 if elements == 32 else 6000  # where small integers multiply it
    for at in HALVES[kind]:
        raw[:, at : at + 2] = (
            (rng.standard_normal(len(raw)) / most).astype(np.float16)[:, None].view(np.uint8)
        )
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(110, 130, len(raw))
    return raw.reshape(rows, -1)


def unpacked_blocks(kind: str, raw: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and words of scales as the layout has them, out of the CPU's reading of the blocks."""
    stored, layout = TensorType[kind], LAYOUTS[GGUF_LAYOUTS[kind]]
    elements, nbytes = stored.block
    blocks = raw.reshape(-1, nbytes)
    signed = np.empty((len(blocks), elements), np.uint8)
    levels_into(stored, blocks, signed)
    scale, minimum = scales_of(stored, blocks)
    if layout.table:
        table = NORMAL_TABLE if layout.name == "nl4" else FP4_TABLE
        levels = (signed.view(np.int8)[..., None] == table).argmax(-1).astype(np.uint8)
    else:
        levels = signed + np.uint8(ZEROS.get(kind, 0))
    zero = 0 if layout.bits == 8 or layout.table or layout.pairs else ZEROS.get(kind, 0)
    if layout.pairs:
        words = half_words(scale[:, ::2], scale[:, 1::2])
    else:
        less = scale * np.float32(zero) if minimum is None else np.float32(0) - minimum
        words = half_words(scale, less)
    rows = len(raw)
    return levels.reshape(rows, k), words.reshape(rows, -1)


def check_blocks(gpu: Machine, rng: np.random.Generator, kind: str) -> None:
    """Blocks packed by the kernel, bit for bit: in one piece, in slices, gates and ups in turns of eight."""
    layout, k = LAYOUTS[GGUF_LAYOUTS[kind]], 512
    i64 = ctypes.c_int64
    raw = stored_blocks(rng, kind, 104, k)
    levels, words = unpacked_blocks(kind, raw, k)
    flip = kind == "MXFP4"  # two levels stand for zero
    size = layout.nbytes(104, k)

    def pack(*parts: tuple[int, int, int, int, int]) -> np.ndarray:
        out = gpu.empty((size,), np.uint8)
        for start, stop, first, padded, kind_of in parts:
            args = [out, i64(first), i64(stop - start), i64(padded), kind_of, k, gpu.array(raw[start:stop]),
                    i64(raw.shape[1])]  # fmt: skip
            gpu.launch(f"sm80_integer_pack_{kind.lower()}", 7, 96, args)
        return out.get()

    wanted = integer.pack_levels(levels, words, layout)
    whole = pack((0, 104, 0, 128, 0))
    if flip:  # compare what levels stand for
        assert same_but_zeros(whole, wanted, layout)
    else:
        assert (whole == wanted).all(), kind
    assert (pack((0, 40, 0, 40, 0), (40, 104, 40, 88, 0)) == whole).all(), kind
    gated = pack((0, 24, 0, 24, 1), (24, 52, 48, 40, 1), (52, 76, 0, 24, 2), (76, 104, 48, 40, 2))
    half = np.zeros((64, k), np.uint8), np.zeros((64, words.shape[1]), np.uint32)
    turned = []
    for part, pad in zip((levels, words), half, strict=True):
        both = [pad.copy(), pad.copy()]
        both[0][:52], both[1][:52] = part[:52], part[52:]
        turned.append(np.stack([b.reshape(8, 8, -1) for b in both], 1).reshape(128, -1))
    wanted = integer.pack_levels(turned[0], turned[1], layout)
    assert same_but_zeros(gated, wanted, layout) if flip else (gated == wanted).all(), kind


def same_but_zeros(found: np.ndarray, wanted: np.ndarray, layout: IntegerLayout) -> bool:
    """Whether packed matrices of a table are equal but for levels that stand for the same number."""
    chunks = [a.reshape(-1, layout.chunk_bytes) for a in (found, wanted)]
    head = layout.runs * 256
    nibbles = [np.stack([c[:, head:] & 15, c[:, head:] >> 4]) for c in chunks]
    return bool(
        (chunks[0][:, :head] == chunks[1][:, :head]).all()
        and (FP4_TABLE[nibbles[0]] == FP4_TABLE[nibbles[1]]).all()
    )


def packed_words(values: np.ndarray, bits: int, axis: int, awq: bool = False) -> np.ndarray:
    """Integers packed into 32-bit words along an axis from the low end, as the formats have them."""
    each = 32 // bits
    values = np.moveaxis(values, axis, -1)
    values = np.pad(values, [(0, 0), (0, -values.shape[1] % each)])
    cut = values.reshape(len(values), -1, each).astype(np.uint32)
    places = [0, 4, 1, 5, 2, 6, 3, 7] if awq else range(each)
    words = np.zeros(cut.shape[:2], np.uint32)
    for i, place in enumerate(places):
        words |= cut[..., i] << np.uint32(place * bits)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def check_words(gpu: Machine, rng: np.random.Generator, dtype: np.dtype, name: str) -> None:
    """GPTQ, AWQ and compressed-tensors words packed by the kernel, bit for bit; ordered columns, no zeros."""
    layout = LAYOUTS[name]
    n, k, bits, size = 72, 384, layout.bits, layout.group
    levels = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, 1 << bits, (n, k // size), dtype=np.uint8)
    scales = (rng.standard_normal(zeros.shape) / 50).astype(np.float16)
    order = rng.permutation(k).astype(np.int32)
    magic = {"bfloat16": 0x4300, "float16": 0x6400}[dtype.name]
    each = 32 // bits

    def wanted(levels: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        if bits == 8:
            return integer.pack_levels(levels, half_words(scales, zeros), layout)
        words = half_words(scales, scales) & 0xFFFF | (zeros.astype(np.uint32) + magic) << 16
        return integer.pack_levels(levels, words, layout)

    def pack(source: integer.WordSource, *held: object) -> np.ndarray:
        out = gpu.empty((layout.nbytes(n, k),), np.uint8)
        args = integer.pack_words_arguments(source, out, n, k, padded_rows=128)
        args = [None if isinstance(a, int) and a == 0 else a for a in args]
        gpu.launch(f"sm80_{SHORT[dtype.name]}_integer_pack_{name}", 5, 96, args)
        return out.get()

    gptq = integer.WordSource(
        levels=gpu.array(packed_words(levels.T, bits, 0)), level_n=1, level_k=n, level_k_per=each,
        zeros=gpu.array(packed_words(zeros.T, bits, 1)), zero_n=1, zero_g=-(-n // each), zero_n_per=each,
        plus_one=True, scales=gpu.array(np.ascontiguousarray(scales.T)), scale_n=1, scale_g=n,
        group_size=size,
    )  # fmt: skip
    plus_one = ((zeros.astype(np.int32) + 1) % (1 << bits)).astype(np.uint8)
    assert (pack(gptq) == wanted(levels, plus_one)).all()
    turned = integer.WordSource(**{**vars(gptq), "order": gpu.array(order), "plus_one": False})
    assert (pack(turned) == wanted(levels[:, order], zeros)).all()
    packed = integer.WordSource(
        levels=gpu.array(packed_words(levels, bits, 1)), level_n=k // each, level_k=1, level_k_per=each,
        scales=gpu.array(scales), scale_n=k // size, scale_g=1, group_size=size,
    )  # fmt: skip
    assert (pack(packed) == wanted(levels, np.full_like(zeros, 1 << (bits - 1)))).all()
    if bits == 4:
        awq = integer.WordSource(
            levels=gpu.array(packed_words(levels.T, 4, 1, awq=True)), level_n=1, level_k=n // 8,
            zeros=gpu.array(packed_words(zeros.T, 4, 1, awq=True)), zero_n=1, zero_g=n // 8,
            level_n_per=8, zero_n_per=8, awq=True,
            scales=gpu.array(np.ascontiguousarray(scales.T)), scale_n=1, scale_g=n, group_size=size,
        )  # fmt: skip
        assert (pack(awq) == wanted(levels, zeros)).all()
    assert CHUNK % size == 0


def check_quantise(gpu: Machine, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Every number within half a step (and what float16 rounds off the step) of its group's nearest level."""
    rows, k = 9, 328
    x = rounded(rng.standard_normal((rows, k), np.float32), dtype)
    x[3, :128] = np.abs(x[3, :128])
    x[4] = 0
    groups, words = -(-k // 128), -(-k // 8)
    levels, zeros = gpu.empty((rows, words), np.uint32), gpu.empty((rows, groups), np.uint32)
    scales = gpu.empty((rows, groups), np.dtype(np.float32))
    source = gpu.array(x.astype(dtype))
    args = [source, levels, zeros, scales, ctypes.c_int64(rows), k]
    gpu.launch(f"sm80_integer_quantise_{SHORT[dtype.name]}", 3, 64, args)
    nibbles = levels.get()[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    group = np.arange(k) // 128
    scale = scales.get()
    found = (nibbles.reshape(rows, -1).astype(np.float32) - zeros.get()[:, group]) * scale[:, group]
    for g in range(groups):
        part = x[:, group == g]
        step = (np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)) / 15
        assert np.allclose(scale[:, g], step, rtol=2**-10)
        # A zero that is no whole level moves all of the group by up to half a step.
        assert (np.abs(found[:, group == g] - part) <= 1.02 * step[:, None] + 1e-6).all()
        assert np.abs(found[:, group == g] - part).mean() <= 0.3 * step.mean()
