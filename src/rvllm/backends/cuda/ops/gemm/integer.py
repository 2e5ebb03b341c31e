"""Products with integer weights on the GPU: how they are packed, and which kernel computes y = x W^T.

Everything here is arithmetic on shapes; nothing touches a device. The kernels are in `kernels/gemm/integer`;
formats.cuh there describes the layout of a packed matrix.

Batch invariance. K is cut into `segments_of(N, K)` segments of whole chunks; every kernel sums a segment's
groups in ascending order and adds the segments in ascending order, so an output's bits do not depend on the
batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.ops.gemm.common import (
    MAX_SEGMENTS,
    Grid,
    ProductPlan,
    ceil_div,
    fit,
    resident_grid,
)
from rvllm.kernels.gemm.integer.specs import (
    CHUNK,
    LAYOUTS,
    SPLIT_TOKENS,
    WALK_TOKENS,
    IntegerLayout,
    sm80_smem,
    smem,
    threads,
)
from rvllm.kernels.gemm.tiles import SM80_TOKENS, SMEM_LIMIT, TILE
from rvllm.program.formats import IntegerFormat
from rvllm.weights.gguf.blocks import FP4_TABLE, NORMAL_TABLE

Mode = Literal["split", "walk", "sm80"]

SEGMENT_CHUNKS = 2  # a segment has at least so many chunks of K
# Segments are cut for so many blocks, two an SM, on every GPU, so that bits do not depend on it.
REFERENCE_BLOCKS = 264
WARP_TOKENS = 32  # up to so many tokens warps multiply for themselves, two blocks an SM; mirrors gemm_sm90.cu
HALF_SM = 115_000  # bytes of shared memory with which two blocks fit an SM
SINGLE_ROUND = 0.55  # of a round of pairs, one of single tiles
TABLES = {"nl4": NORMAL_TABLE.astype(np.float64), "mx4": FP4_TABLE.astype(np.float64)}


def segments_of(n: int, k: int) -> int:
    """Into how many segments the sums over K are cut: a function of the weight's shape alone."""
    pairs, chunks = ceil_div(n, 2 * TILE), ceil_div(k, CHUNK)
    most = max(1, min(MAX_SEGMENTS, REFERENCE_BLOCKS // pairs, chunks // SEGMENT_CHUNKS))
    return 1 << most.bit_length() - 1


def order_bytes(kept: IntegerFormat, columns: int) -> int:
    """Bytes of the order of a matrix's columns, which lies behind it; a multiple of 256, as chunks are."""
    return ceil_div(4 * kept.packed_width(columns), 256) * 256 if kept.reordered else 0


def stack_stride(kept: IntegerFormat, rows: int, columns: int) -> int:
    """Bytes from one packed [rows, columns] matrix of a stack to the next."""
    ((_, layout),) = kept.parts
    return LAYOUTS[layout].nbytes(rows, kept.packed_width(columns)) + order_bytes(kept, columns)


@dataclass(frozen=True, kw_only=True)
class IntegerPlan(ProductPlan):
    """A launch of a kernel for integer weights, whose blocks of K are chunks of 128."""

    mode: Mode
    layout: IntegerLayout


def plan_integer(
    n: int, k: int, tokens: int, dtype: str, layout: IntegerLayout, sm_count: int, capability: int = 90
) -> IntegerPlan:
    """Chooses the kernel for y [tokens, n] = x [tokens, k] W^T. n: packed rows that exist."""
    if capability != 90:
        return variant(n, k, tokens, dtype, layout, "sm80", fit(SM80_TOKENS, tokens), sm_count)
    segments = segments_of(n, k)
    if tokens <= WARP_TOKENS:
        mode: Mode = "split" if segments > 1 else "walk"
        return variant(n, k, tokens, dtype, layout, mode, fit(WALK_TOKENS, tokens), sm_count, segments)
    plans = [
        variant(n, k, tokens, dtype, layout, "walk", size, sm_count)
        for size in WALK_TOKENS
        if size > WARP_TOKENS
    ]
    for cluster in (segments, segments // 2):  # a block sums one segment, or two
        if cluster > 1:
            plans += [
                variant(n, k, tokens, dtype, layout, "split", size, sm_count, cluster)
                for size in SPLIT_TOKENS
                if size > WARP_TOKENS
            ]
    fitting = [plan for plan in plans if plan.smem <= SMEM_LIMIT]
    return min(fitting, key=lambda plan: _microseconds(plan, sm_count))


def _microseconds(plan: IntegerPlan, sm_count: int) -> float:
    """About how long a product of more than WARP_TOKENS tokens takes; fitted to an H200 within a tenth."""
    pairs, token_tiles = ceil_div(plan.rows, 2 * TILE), ceil_div(plan.tokens, plan.token_tile)
    chunk = 0.0045 * (plan.token_tile + 60)
    if plan.token_tile == WALK_TOKENS[-1] and plan.segments > 1:
        chunk *= 1.1  # totals leave room for two stages
    if plan.mode == "split":
        waves = ceil_div(pairs * token_tiles * plan.cluster, sm_count)
        return waves * (ceil_div(plan.blocks, plan.cluster) * chunk + 7)
    full, rest = divmod(pairs * token_tiles, sm_count)
    last = SINGLE_ROUND if full and 0 < 2 * rest <= sm_count else float(rest > 0)
    return 4 + (full + last) * plan.blocks * chunk


def variant(
    n: int,
    k: int,
    tokens: int,
    dtype: str,
    layout: IntegerLayout,
    mode: Mode,
    token_tile: int,
    sm_count: int,
    cluster: int = 1,
) -> IntegerPlan:
    """The plan of one given kernel; cluster: blocks that share the segments of a split product."""
    segments, token_tiles = segments_of(n, k), ceil_div(tokens, token_tile)
    name, block, box_rows = f"{mode}_n{token_tile}", threads(token_tile), token_tile
    if mode == "sm80":
        grid: Grid = (ceil_div(n, TILE), token_tiles, 1)
        cluster, name, block, box_rows, why = 1, f"n{token_tile}", 128, 0, "mma.sync"
        memory = sm80_smem(layout, token_tile)
    elif mode == "split":
        grid, why = (cluster, token_tiles, ceil_div(n, 2 * TILE)), "K split over a cluster"
        limit = HALF_SM if token_tile <= WARP_TOKENS else SMEM_LIMIT
        memory = smem(layout, mode, token_tile, segments // cluster, limit)
    else:
        cluster, two, why = 1, token_tile < WARP_TOKENS, "resident blocks walk over tiles"
        grid = resident_grid(n, tokens, token_tile, 1, 2 * sm_count if two else sm_count)
        memory = smem(layout, mode, token_tile, segments, HALF_SM if two else SMEM_LIMIT)
    return IntegerPlan(
        kernel=f"sm{80 if mode == 'sm80' else 90}_{dtype}_integer_{layout.name}_{name}",
        layout=layout,
        mode=mode,
        tokens=tokens,
        rows=n,
        blocks=ceil_div(k, CHUNK),
        segments=segments,
        token_tile=token_tile,
        box_rows=box_rows,
        grid=grid,
        block=block,
        cluster=cluster,
        smem=memory,
        why=why,
    )


@dataclass(frozen=True)
class WordSource:
    """Levels, zeros and scales of a matrix as GPTQ, AWQ and compressed-tensors store them, on the device.

    Element (n, k) of levels is in the word at n // level_n_per * level_n + k // level_k_per * level_k, its
    place there (n + k) % per; zeros likewise by groups. skips: elements of the first word before row 0.
    zeros 0: all are 2^(bits - 1); plus_one: they are stored one less. flip: bits of levels that are turned
    over, and of zeros. scale_kind: 0 float16, 1 bfloat16, 2 float32. order: the address of the stored column
    of each packed one (int32, -1 for none), or 0.
    """

    levels: Any
    scales: Any
    level_n: int
    level_k: int
    scale_n: int
    scale_g: int
    group_size: int
    level_n_per: int = 1
    level_k_per: int = 1
    level_skip: int = 0
    zeros: Any = 0
    zero_n: int = 0
    zero_g: int = 0
    zero_n_per: int = 1
    zero_g_per: int = 1
    zero_skip: int = 0
    awq: bool = False
    plus_one: bool = False
    flip: int = 0
    scale_kind: int = 0
    order: Any = 0


def pack_words_arguments(
    source: WordSource,
    packed: Any,
    rows: int,
    k: int,
    *,
    first: int = 0,
    padded_rows: int | None = None,
    interleave: int = 0,
) -> list[Any]:
    """Parameters of `sm80_*_integer_pack_*` for words; rows as in `pack_arguments`. Any grid and block do."""
    s, i, i64 = source, ctypes.c_int, ctypes.c_int64
    return [
        packed, *_rows(rows, first, padded_rows, interleave), i(k),
        s.levels, i64(s.level_n), i64(s.level_k), i(s.level_n_per), i(s.level_k_per), i(s.level_skip),
        s.zeros, i64(s.zero_n), i64(s.zero_g), i(s.zero_n_per), i(s.zero_g_per), i(s.zero_skip),
        i(s.awq), i(s.plus_one), i(s.flip), s.scales, i(s.scale_kind), i64(s.scale_n), i64(s.scale_g),
        i(s.group_size), s.order,
    ]  # fmt: skip


def pack_blocks_arguments(
    blocks: Any,
    row_bytes: int,
    packed: Any,
    rows: int,
    k: int,
    *,
    first: int = 0,
    padded_rows: int | None = None,
    interleave: int = 0,
) -> list[Any]:
    """Parameters of `sm80_integer_pack_q4_k` and its like: GGUF blocks, rows of `row_bytes`."""
    return [
        packed,
        *_rows(rows, first, padded_rows, interleave),
        ctypes.c_int(k),
        blocks,
        ctypes.c_int64(row_bytes),
    ]


def _rows(rows: int, first: int, padded: int | None, interleave: int) -> list[Any]:
    if padded is None:
        padded = rows if not interleave else 8 * ceil_div(rows, 8)
    return [ctypes.c_int64(first), ctypes.c_int64(rows), ctypes.c_int64(padded), ctypes.c_int(interleave)]


def pack_levels(
    levels: NDArray[np.uint8], words: NDArray[np.uint32], layout: IntegerLayout
) -> NDArray[np.uint8]:
    """Packs levels [N, K] and words of scales [N, ceil(K / layout.run)]; the reference of the pack kernels.

    Returns layout.nbytes(N, K) bytes.
    """
    n, k = levels.shape
    tiles, chunks = ceil_div(n, TILE), ceil_div(k, CHUNK)
    whole = np.zeros((tiles * TILE, chunks * CHUNK), np.uint8)
    whole[:n, :k] = levels
    # row = 16 w + 8 rb + g, column of a chunk = 64 u + 16 j + 8 cb + 2 c + h; thread t = 32 w + 4 g + c
    cut = whole.reshape(tiles, 4, 2, 8, chunks, 2, 4, 2, 4, 2)
    ordered = cut.transpose(0, 4, 5, 1, 3, 8, 6, 9, 7, 2).reshape(tiles, chunks, 2, 128, 4, 8)  # ... j, place
    planes, shift = [], 0
    for bits in layout.planes:
        planes.append(
            _plane(ordered >> np.uint8(shift) & np.uint8((1 << bits) - 1), bits).reshape(tiles, chunks, 2, -1)
        )
        shift += bits
    scales = np.zeros((tiles * TILE, chunks * layout.runs), np.uint32)
    scales[:n, : words.shape[1]] = words
    runs = scales.reshape(tiles, TILE, chunks, layout.runs).transpose(0, 2, 3, 1)
    head = np.ascontiguousarray(runs).view(np.uint8).reshape(tiles, chunks, -1)
    units = np.concatenate(planes, axis=3).reshape(tiles, chunks, -1)
    return np.concatenate([head, units], axis=2).reshape(-1)


def _plane(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Levels [..., thread, step, place] as the bytes of one plane."""
    step, place = np.meshgrid(np.arange(4), np.arange(8), indexing="ij")
    byte, half = place // 2, place % 2
    word, bit = {
        8: (4 * half + step, 8 * byte),
        4: (step, 4 * place),
        2: (step // 2, 8 * byte + 4 * (step % 2) + 2 * half),
        1: (0 * step, 8 * byte + 2 * step + half),
    }[bits]
    out = np.zeros((*levels.shape[:-2], bits), np.uint32)
    for s in range(4):
        for p in range(8):
            out[..., word[s, p]] |= levels[..., s, p].astype(np.uint32) << np.uint32(bit[s, p])
    if bits == 8:  # two planes of 16 bytes a thread
        out = out.reshape(*out.shape[:-2], 128, 2, 4).swapaxes(-2, -3)
    return np.ascontiguousarray(out).view(np.uint8)


def multiplied(
    levels: NDArray[np.uint8], words: NDArray[np.uint32], layout: IntegerLayout, dtype: np.dtype[Any]
) -> NDArray[np.float32]:
    """What products are of, float32 [N, K]: the reference of the kernels' decoding.

    dtype: bfloat16 or float16. Layouts of integers: (level - zero) * scale, though kernels multiply a group's
    sum by its scale; others: level * scale - minimum, in float32 (with one rounding more, of the minimum and
    the 128 that levels are raised by), rounded to dtype.
    """
    run = np.arange(levels.shape[1]) // layout.run
    low = (words & 0xFFFF).astype(np.uint16)[:, run]
    high = (words >> 16).astype(np.uint16)[:, run]
    if layout.integers:
        magic = {"bfloat16": 0x4300, "float16": 0x6400}[dtype.name]
        zero = high.view(np.float16).astype(np.float32) if layout.bits == 8 else high.astype(np.int32) - magic
        return (levels - zero).astype(np.float32) * low.view(np.float16)
    first, second = (half.view(np.float16).astype(np.float64) for half in (low, high))
    if layout.pairs:
        scale = np.where(np.arange(levels.shape[1]) // layout.group % 2, second, first)
        exact = scale * (levels.astype(np.float64) - (1 << (layout.bits - 1)))
    elif layout.table or layout.bits == 8:
        signed = TABLES[layout.name][levels] if layout.table else levels.astype(np.float64) - 128
        exact = first * signed - second
    else:
        less = (-128 * first - second).astype(np.float32)
        exact = (levels + 128.0) * first + less
    return exact.astype(np.float32).astype(dtype).astype(np.float32)


def dummy_word(layout: IntegerLayout) -> int:
    """A word of scales under which random levels have deviation 0.02 and mean 0.

    Of layouts of 4-bit integers the offset is the zero alone: the fill kernel adds what the type wants.
    """
    numbers = TABLES[layout.name] if layout.table else np.arange(1 << layout.bits, dtype=np.float64)
    scale = np.float16(0.02 / numbers.std())
    middle = 1 << (layout.bits - 1)
    if layout.integers and layout.bits == 4:
        return int(scale.view(np.uint16)) | middle << 16
    if layout.integers:
        other = float(middle)
    elif layout.pairs:
        other = float(scale)
    else:
        other = 0.0 if layout.table or layout.bits == 8 else float(scale) * middle
    return int(scale.view(np.uint16)) | int(np.float16(other).view(np.uint16)) << 16
