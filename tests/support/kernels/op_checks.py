"""Row kernels, dequantisation and fill against the NumPy reference."""

from __future__ import annotations

import ctypes

import numpy as np

from rvllm.backends.cpu.reference import ops
from rvllm.kernels.gemm.integer.specs import GGUF_LAYOUTS
from rvllm.kernels.loading.specs import FORMATS
from rvllm.kernels.rowwise.specs import ACTIVATIONS, norm_kernel
from rvllm.program.rope import Rope
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.blocks import dequantise
from support.kernels.harness import BF16, F16, SHORT, Gpu, error, expect, rounded

LIMIT = {"bfloat16": 3e-3, "float16": 4e-4}


def normal(rng: np.random.Generator, dtype: np.dtype, *shape: int) -> np.ndarray:
    return rounded(rng.standard_normal(shape, np.float32) * 2, dtype)


def untouched(values: np.ndarray) -> bool:
    return bool(np.isnan(values.astype(np.float32)).all())


def check_embed(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Ids and last tokens, a scale, rows beyond the count."""
    worst = 0.0
    for width, scale in ((64, 1.0), (896, 29.93)):
        table = normal(rng, dtype, 301, width)
        tokens = rng.integers(0, 301, 9).astype(np.int32)
        slots = rng.permutation(16)[:9].astype(np.int32)
        last = rng.integers(0, 301, 16).astype(np.int32)
        given = np.where(np.arange(9) % 3 == 0, -1, tokens).astype(np.int32)
        out = gpu.empty((9, width), dtype)
        args = [out, gpu.array(table.astype(dtype)), gpu.array(given), gpu.array(slots), gpu.array(last),
                gpu.array([7], np.int32), width, float(scale)]  # fmt: skip
        gpu.launch(f"sm80_{SHORT[dtype.name]}_embed", 9, 128, args)
        result = out.get()
        wanted = ops.embed(np.where(given < 0, last[slots], given)[:7], table, scale)
        worst = max(worst, error(result[:7], wanted))
        assert untouched(result[7:])
    expect("embed", worst, LIMIT[dtype.name])
    return worst


def check_embed_blocks(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> None:
    """Rows of tables in GGUF's blocks: the bits of the table expanded to the 16-bit type."""
    width, tokens = 512, np.array([4, -1, 0, 16, 3], np.int32)
    for i, kind in enumerate(GGUF_LAYOUTS):
        raw = random_blocks(rng, TensorType[kind], 17 * width // TensorType[kind].block[0])
        scale = 29.93 if i % 2 else 1.0
        table = dequantise(TensorType[kind], raw, (17, width))
        with np.errstate(over="ignore"):
            wanted = table[[4, 9, 0, 16]].astype(dtype)
            if scale != 1:
                wanted = (wanted.astype(np.float32) * np.float32(scale)).astype(dtype)
        out = gpu.empty((5, width), dtype)
        args = [out, gpu.array(raw), gpu.array(tokens), gpu.array([0, 2, 0, 0, 0], np.int32),
                gpu.array([7, 7, 9], np.int32), gpu.array([4], np.int32), width, scale]  # fmt: skip
        gpu.launch(f"sm80_{SHORT[dtype.name]}_embed_{kind.lower()}", 5, 32, args)
        result = out.get()
        assert (result[:4].view(np.uint16) == wanted.view(np.uint16)).all() and untouched(result[4:]), kind


def check_norm(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Both kinds, with and without the residual add, narrow to wide."""
    worst = 0.0
    for width in (64, 576, 896, 3584, 8192, 16384):
        for kind in ("rms", "layer"):
            for add in (False, True):
                x, y = normal(rng, dtype, 5, width), normal(rng, dtype, 5, width)
                weight, bias = rng.standard_normal((2, width), np.float32)
                dx, out = gpu.array(x.astype(dtype)), gpu.empty((5, width), dtype)
                name, threads = norm_kernel(dtype.name, kind, width, add)
                bias_array = gpu.array(bias) if kind == "layer" else None
                args = [out, dx, gpu.array(y.astype(dtype)), gpu.array(weight), bias_array, width, 1e-5, 0.75]
                gpu.launch(name, 5, threads, args)
                total = rounded(ops.add(x, y, 0.75), dtype) if add else x
                reference = (
                    ops.rms_norm(total, weight, 1e-5)
                    if kind == "rms"
                    else ops.layer_norm(total, weight, bias, 1e-5)
                )
                worst = max(worst, error(out.get(), reference))
                expect("residual", error(dx.get(), total), LIMIT[dtype.name])
    expect("norm", worst, LIMIT[dtype.name])
    return worst


def check_norm_groups(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Heads inside a fused row, one weight for all or one each; the other columns stay as they are."""
    worst = 0.0
    for group, slices, start, each in (
        (128, 9, 0, False),
        (64, 3, 128, True),
        (80, 5, 80, False),
        (256, 2, 0, True),
    ):
        for kind in ("rms", "layer"):
            pitch = start + slices * group + 48
            x = normal(rng, dtype, 3, pitch)
            weight = rng.standard_normal(slices * group if each else group, np.float32)
            bias = rng.standard_normal(weight.shape, np.float32)
            dx = gpu.array(x.astype(dtype))
            args = [
                dx,
                gpu.array(weight),
                gpu.array(bias),
                pitch,
                start,
                slices,
                group,
                group if each else 0,
                1e-6,
            ]
            gpu.launch(f"sm80_{SHORT[dtype.name]}_norm_groups_{kind}", (-(-slices // 4), 3), 128, args)
            heads = x[:, start : start + slices * group].reshape(3, slices, group)
            w = weight.reshape(-1, group)[None]
            b = bias.reshape(-1, group)[None]
            reference = x.copy()
            normed = (
                ops.rms_norm(heads, None, 1e-6) if kind == "rms" else ops.layer_norm(heads, None, None, 1e-6)
            )
            normed = normed * w + (b if kind == "layer" else 0)
            reference[:, start : start + slices * group] = normed.reshape(3, -1)
            worst = max(worst, error(dx.get(), reference))
            outside = np.ones(pitch, bool)
            outside[start : start + slices * group] = False
            assert (dx.get().astype(np.float32)[:, outside] == x[:, outside]).all()
    expect("norm_groups", worst, LIMIT[dtype.name])
    return worst


def check_rope(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Full and partial rotation, both pairings, none; cache entries of other positions stay as they are."""
    worst = 0.0
    cases = [
        (128, 128, False, 7, 2),
        (64, 64, True, 3, 3),
        (80, 20, False, 2, 1),
        (80, 32, False, 17, 3),
        (96, 96, True, 1, 1),
        (64, 0, False, 4, 2),
    ]
    for dim, rotated, interleaved, heads, kv in cases:
        rows, count, slots, stride, blocks = 11, 9, 5, 8, 60
        pitch = (heads + 2 * kv) * dim
        qkv = normal(rng, dtype, rows, pitch)
        positions = rng.choice(stride * 16, rows, replace=False).astype(np.int32)
        token_slots = rng.integers(0, slots, rows).astype(np.int32)
        tables = rng.permutation(blocks)[: slots * stride].reshape(slots, stride).astype(np.int32)
        cos, sin = Rope(dim=max(rotated, 4), theta=1e4).table(stride * 16)
        caches = [gpu.empty((blocks, kv, 16, dim), dtype) for _ in range(2)]
        device = gpu.array(qkv.astype(dtype))
        suffix = "_interleaved" if interleaved else ""
        args = [device, *caches, gpu.array(cos), gpu.array(sin), gpu.array(tables), gpu.array(positions),
                gpu.array(token_slots), gpu.array([count], np.int32), pitch, stride, heads, kv, dim,
                rotated]  # fmt: skip
        name = f"sm80_{SHORT[dtype.name]}_rope_kv{suffix}"
        gpu.launch(name, (-(-(heads + 2 * kv) // 4), rows), 128, args)
        parts = qkv.reshape(rows, heads + 2 * kv, dim)
        turned = parts.copy()
        if rotated:
            turned[:, : heads + kv] = ops.rotate(
                parts[:, : heads + kv], cos[positions], sin[positions], interleaved
            )
        out = device.get().astype(np.float32).reshape(rows, -1, dim)
        worst = max(worst, error(out[:count, :heads], turned[:count, :heads]))
        assert (out[:, heads:] == parts[:, heads:]).all(), "keys and values of the row itself changed"
        assert (out[count:] == parts[count:]).all()
        written = np.zeros((blocks, 16), bool)
        for which, cache in enumerate(caches):
            values = cache.get()
            for t in range(count):
                block, at = tables[token_slots[t], positions[t] // 16], positions[t] % 16
                first = heads + which * kv
                worst = max(worst, error(values[block, :, at], turned[t, first : first + kv]))
                written[block, at] = True
            assert untouched(values.transpose(0, 2, 1, 3)[~written])
        if not interleaved and rotated % 16 == 0:  # a block a row gives the same bits
            again = [
                gpu.array(qkv.astype(dtype)),
                *(gpu.empty((blocks, kv, 16, dim), dtype) for _ in range(2)),
            ]
            gpu.launch(f"{name}_rows", rows, 128, [*again, *args[3:]])
            for one, other in zip([device, *caches], again, strict=True):
                assert (one.get().view(np.uint16) == other.get().view(np.uint16)).all()
    expect("rope", worst, LIMIT[dtype.name])
    return worst


def check_activation(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Every function, plain and gated."""
    worst = 0.0
    for name in ACTIVATIONS:
        for gated in (True, False):
            width = 1544
            x = normal(rng, dtype, 3, width * (2 if gated else 1))
            out = gpu.empty((3, width), dtype)
            args = [out, gpu.array(x.astype(dtype)), width]
            gpu.launch(f"sm80_{SHORT[dtype.name]}_{'gated' if gated else 'act'}_{name}", (1, 3), 256, args)
            reference = ops.gated_activation(x, name) if gated else ops.activate(x, name)
            worst = max(worst, error(out.get(), reference))
    expect("activation", worst, LIMIT[dtype.name])
    return worst


def check_gather_add(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> float:
    """Rows gathered exactly, of one buffer or of two; x += y * scale."""
    x, y = normal(rng, dtype, 20, 1032), normal(rng, dtype, 20, 1032)
    rows = rng.permutation(20)[:6].astype(np.int32)
    out, dx = gpu.empty((6, 1032), dtype), gpu.array(x.astype(dtype))
    short = SHORT[dtype.name]
    other = normal(rng, dtype, 20, 2056)
    for second in (0, 2056):
        more = gpu.empty((6, 2056), dtype)
        args = [out, dx, gpu.array(rows), gpu.array([5], np.int32), 1032]
        args += (
            [more, gpu.array(other.astype(dtype)), second]
            if second
            else [ctypes.c_uint64(0), ctypes.c_uint64(0), 0]
        )
        gpu.launch(f"sm80_{short}_gather_rows", 6, 128, args)
        for result, source, there in ((out.get(), x, True), (more.get(), other, second)):
            assert not there or (result[:5].astype(np.float32) == source[rows[:5]]).all()
            assert untouched(result[5 if there else 0 :])
    gpu.launch(f"sm80_{short}_add", 3, 256, [dx, gpu.array(y.astype(dtype)), ctypes.c_uint64(x.size), 0.5])
    worst = error(dx.get(), ops.add(x, y, 0.5))
    expect("add", worst, LIMIT[dtype.name])
    return worst


def random_blocks(rng: np.random.Generator, kind: TensorType, blocks: int) -> np.ndarray:
    """Random bytes whose scales are finite; of either sign, some subnormal."""
    _, nbytes = kind.block
    raw = rng.integers(0, 256, (blocks, nbytes), dtype=np.uint8)
    scales = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2],
              "Q5_K": [0, 2], "Q6_K": [208], "F16": [0], "Q2_K": [80, 82], "Q3_K": [108],
              "IQ4_NL": [0], "IQ4_XS": [0]}  # fmt: skip
    for at in scales.get(kind.name, []):
        scale = rng.standard_normal(blocks).astype(np.float16)
        scale[::3] *= np.float16(2**-18)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    if kind.name == "F32":
        raw[:] = rng.standard_normal((blocks, 1), np.float32).view(np.uint8)
    if kind.name == "BF16":
        raw[:] = rng.standard_normal((blocks, 1), np.float32).astype(BF16).view(np.uint8)
    return raw.reshape(-1)


def check_dequant(gpu: Gpu, rng: np.random.Generator) -> int:
    """Every format into every type, bit for bit."""
    compared = 0
    for kind in FORMATS:
        stored = TensorType[kind]
        elements, _ = stored.block
        blocks = 37 * 8 if elements == 1 else 37
        raw = random_blocks(rng, stored, blocks)
        reference = dequantise(stored, raw, (blocks * elements,))
        for dtype in (np.dtype(np.float32), BF16, F16):
            out = gpu.empty((blocks * elements,), dtype)
            grid = -(-out.shape[0] // (8 * 128))
            args = [out, gpu.array(raw), ctypes.c_uint64(out.shape[0])]
            gpu.launch(f"sm80_{SHORT[dtype.name]}_dequant_{kind.lower()}", grid, 128, args, pdl=False)
            with np.errstate(over="ignore"):
                wanted = reference.astype(dtype)
            result = out.get()
            assert (result.view(np.uint8) == wanted.view(np.uint8)).all(), f"{kind} to {dtype}"
            compared += result.size
    return compared


def _mixed(x: np.ndarray, seed: np.ndarray) -> np.ndarray:
    x = (x ^ seed) * np.uint32(0x9E3779B9)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def check_fill(gpu: Gpu, rng: np.random.Generator) -> float:
    """The same numbers as the formula in NumPy, their moments, and the checksum of memory."""
    n, first, seed, std = 40_000, (1 << 32) - 16_000, 12345, 0.02
    index = np.arange(first, first + n, dtype=np.uint64)
    seeds = np.uint32(seed) ^ ((index >> np.uint64(32)).astype(np.uint32) * np.uint32(0x85EBCA6B))
    h = _mixed(index.astype(np.uint32), seeds)
    total = sum((h >> np.uint32(8 * i)) & np.uint32(255) for i in range(4)).astype(np.float32)
    reference = (total - np.float32(510)) * np.float32(1 / 147.801) * np.float32(std)
    worst = 0.0
    for dtype in (np.dtype(np.float32), BF16, F16):
        out = gpu.empty((n,), dtype)
        args = [out, ctypes.c_uint64(n), ctypes.c_uint64(first), ctypes.c_uint(seed), 0.0, std]
        gpu.launch(f"sm80_{SHORT[dtype.name]}_fill_random", 7, 256, args, pdl=False)
        result = out.get().astype(np.float32)
        worst = max(worst, error(result, reference))
        expect("mean", abs(float(result.mean())), 4e-4)
        expect("deviation", abs(float(result.std()) / std - 1), 0.02)
    expect("fill", worst, 3e-3)
    words = rng.integers(0, 2**32, 10_001, dtype=np.uint32)
    total_sum = gpu.zeros((1,), np.uint64)
    gpu.launch("sm80_checksum", 5, 128, [total_sum, gpu.array(words), ctypes.c_uint64(len(words))], pdl=False)
    wanted = _mixed(words.copy(), np.arange(len(words), dtype=np.uint32)).astype(np.uint64).sum()
    assert int(total_sum.get()[0]) == int(wanted)
    return worst


ROW_CHECKS = [
    check_embed, check_embed_blocks, check_norm, check_norm_groups, check_rope, check_activation,
    check_gather_add,
]  # fmt: skip
