"""A paged cache in E4M3: its layout, spelled out apart from the kernels', and the kernel that fills it."""

from __future__ import annotations

import numpy as np

from rvllm.backends.cpu.reference import fp8_cache, ops
from rvllm.program.rope import Rope
from support.kernels.harness import BF16, SHORT, Gpu, rounded

BLOCK = 16
ONE = {"bfloat16": 247, "float16": 23}  # the exponents of 1 in the factors that kernels multiply with


def lowest(dtype: np.dtype) -> int:
    """The least exponent of a power of two."""
    return fp8_cache.LOW if dtype == BF16 else fp8_cache.LOW_F16


def key_places(dim: int) -> np.ndarray:
    """int [16, dim]: the byte of a piece where a position's column is, of keys."""
    out = np.zeros((BLOCK, dim), np.int64)
    for row in range(BLOCK):
        for column in range(dim):
            k, within = divmod(column, 16)
            c, odd, low = within % 8 // 2, within % 2, within // 8  # low: the bytes 0 and 2
            byte, group = 2 * odd + 1 - low, k // 4
            if group >= dim // 64:  # behind the last 64 columns: c by c
                rest = dim // 16 % 4
                word = group * 16 + c * rest + k % 4
            else:
                word = ((group ^ (row & 1 if dim % 128 == 0 else 0)) * 4 + c) * 4 + k % 4
            out[row, column] = row * dim + 4 * word + byte
    return out


def value_places(dim: int) -> np.ndarray:
    """The same of values."""
    out = np.zeros((BLOCK, dim), np.int64)
    for row in range(BLOCK):
        for column in range(dim):
            r, chunk = row % 8, column // 8
            place = chunk ^ r if dim % 64 == 0 else chunk
            out[row, column] = r * 2 * dim + place * 16 + column % 8 * 2 + (row < 8)
    return out


def pieces(rows: np.ndarray, dtype: np.dtype, places: np.ndarray) -> np.ndarray:
    """float32 [..., 16, dim], NaN where nothing has been written, to bytes [..., 16 (dim + 1)]."""
    dim = rows.shape[-1]
    kept = fp8_cache.stored(rows, lowest(dtype))
    codes, power = kept[..., :-1], kept[..., -1].astype(int) - 127 + ONE[dtype.name]
    unwritten = np.isnan(rows).any(axis=-1)
    out = np.full((*rows.shape[:-2], BLOCK * (dim + 1)), 255, np.uint8)
    out[..., places] = np.where(unwritten[..., None], 255, codes)
    out[..., BLOCK * dim :] = np.where(unwritten, 255, power)
    return out


def check_fill(gpu: Gpu, rng: np.random.Generator, dtype: np.dtype) -> None:
    """rope_kv_fp8 of all kinds: codes, powers and places of rows small, large, zero and infinite."""
    for dim, heads, kv_heads, kind in (
        (128, 4, 2, ""),
        (128, 3, 3, "_rows"),
        (80, 7, 1, "_rows"),
        (64, 3, 1, "_interleaved"),
        (80, 2, 1, ""),
        (256, 2, 1, ""),
    ):
        interleaved = kind == "_interleaved"
        tokens, positions, stride = 9, np.array([0, 7, 8, 15, 16, 3, 11, 30, 31], np.int32), 4
        slots = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1], np.int32)
        table = np.array([[3, 0, 9, 9], [1, 4, 9, 9]], np.int32)
        width = (heads + 2 * kv_heads) * dim
        qkv = rng.standard_normal((tokens, width), np.float32)
        qkv *= np.exp2(rng.integers(-12, 10, (tokens, 1)).astype(np.float32))
        qkv[3, heads * dim :] = 0
        qkv[4] *= 60000 / np.abs(qkv[4]).max()
        qkv[5] *= 1e-6 / np.abs(qkv[5]).max()
        qkv = rounded(qkv, dtype)
        qkv[7, (heads + kv_heads) * dim + 5] = np.inf
        rope = Rope(dim=dim, theta=10000.0, interleaved=interleaved)
        cos, sin = rope.table(64)
        given = gpu.array(qkv.astype(dtype))
        caches = [gpu.empty((5, kv_heads, BLOCK * (dim + 1)), np.uint8) for _ in range(2)]
        args = [given, *caches, gpu.array(cos, np.float32), gpu.array(sin, np.float32), gpu.array(table),
                gpu.array(positions), gpu.array(slots), gpu.array([tokens], np.int32), width, stride, heads,
                kv_heads, dim, dim]  # fmt: skip
        grid = (tokens, 1) if kind == "_rows" else (-(-(heads + 2 * kv_heads) // 4), tokens)
        gpu.launch(f"sm80_{SHORT[dtype.name]}_rope_kv_fp8{kind}", grid, 128, args)
        rows = qkv.reshape(tokens, -1, dim)
        turned = heads + kv_heads
        rows = rows.copy()
        rows[:, :turned] = rounded(
            ops.rotate(rows[:, :turned], cos[positions], sin[positions], interleaved), dtype
        )
        queries = given.get().astype(np.float32).reshape(tokens, -1, dim)[:, :heads]
        np.testing.assert_allclose(queries, rows[:, :heads], rtol=2**-7, atol=2**-20)
        for cache, part, places in ((caches[0], rows[:, heads:turned], key_places(dim)),
                                    (caches[1], rows[:, turned:], value_places(dim))):  # fmt: skip
            _check_pieces(
                cache.get(), part, dtype, places, table[slots, positions // BLOCK], positions % BLOCK
            )


def _check_pieces(
    found: np.ndarray,
    rows: np.ndarray,
    dtype: np.dtype,
    places: np.ndarray,
    blocks: np.ndarray,
    at: np.ndarray,
) -> None:
    dim, seen = rows.shape[-1], np.zeros(found.shape, bool)
    for row, block, position in zip(rows, blocks, at, strict=True):
        for head, numbers in enumerate(row):
            kept = fp8_cache.stored(numbers, lowest(dtype))
            piece = found[block, head]
            seen[block, head, places[position]] = seen[block, head, BLOCK * dim + position] = True
            if kept[-1] == 255:
                assert piece[BLOCK * dim + position] == (255 if dtype == BF16 else 31)
                continue
            assert piece[BLOCK * dim + position] == int(kept[-1]) - 127 + ONE[dtype.name]
            # A rotation may round to the other neighbour in the 16-bit type, and so may its code.
            ours, theirs = (
                fp8_cache.loaded(np.append(c, kept[-1])) for c in (kept[:-1], piece[places[position]])
            )
            assert (np.abs(ours - theirs) <= np.abs(ours) / 8 + np.abs(ours).max() / 2**14).all()
            assert (ours != theirs).mean() < 0.05
    assert (found[~seen] == 255).all(), "bytes beside the rows were written"
