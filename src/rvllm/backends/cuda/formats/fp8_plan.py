"""Products of E4M3 weights on sm_90a: how weights are packed, and which kernel computes y = x W^T for a
batch.

Everything here is arithmetic on shapes; nothing touches a device. The kernels are in `kernels/gemm/fp8/`;
what a number means stands in `fp8.cuh`.

Packed weights. W [N, K] becomes tiles of 64 x 128 bytes: tile (i, j) at byte (i * ceil(K / 128) + j) *
8192, row r of a tile at 128 * r, the 16-byte chunk c of a row at 16 * (c ^ (r % 8)). Missing rows and
columns are zeros. A fused gate/up matrix interleaves its two halves by eights first. Behind the tiles lie
float32 scales, see `scales_shape`.

Batch invariance. K is cut into `segments_of(N, K)` segments. In each, sums of 256 products (of 128, where
weights have scales of their own for them) are scaled and added up in ascending order, and so are then the
segments, in every kernel.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.ops.gemm import common
from rvllm.backends.cuda.ops.gemm.common import (
    MAX_SEGMENTS,
    SMALL_STAGES,
    SMALL_WEIGHT,
    ProductPlan,
    ceil_div,
    fit,
    resident_grid,
)
from rvllm.errors import UsageError
from rvllm.kernels.gemm.fp8.specs import (
    BLOCK_K,
    MAX_PAIR_SEGMENTS,
    MAX_STAGES,
    MODES,
    TALL_ROWS,
    cluster_of,
    is_resident,
    is_split,
    sm80_smem,
    smem_of,
    threads_of,
    widest_segment,
)
from rvllm.kernels.gemm.tiles import DTYPES, SM80_TOKENS, TILE, TILE_BYTES

Mode = Literal[
    "split",
    "walk",
    "sum",
    "split_resident",
    "walk_resident",
    "tall",
    "tall_sum",
    "square",
    "square_sum",
    "square_pair",
    "sm80",
]
Scales = Literal["row", "block"]

TALL_MODES: dict[bool, tuple[Mode, ...]] = {  # by whether a weight has one segment
    True: ("tall", "square"),
    False: ("tall_sum", "square_sum", "square_pair"),
}
# Cycles that a tile of them takes for 128 of K, fitted to an H200.
TALL_STEP = {"tall": 690, "square": 470, "tall_sum": 766, "square_sum": 470}
RESIDENT_UNITS = 160  # tokens x blocks of K a block quantises; with more, doing it once for all is quicker
ONE_TILE = 128  # up to so many tokens a split product is the quickest
INFLOW = 52  # bytes a cycle that a multiprocessor takes in
ALIGNMENT = 256  # of the scales behind the tiles


@dataclass(frozen=True, kw_only=True)
class Fp8Plan(ProductPlan):
    """A launch of a kernel for E4M3 weights, whose blocks of K are 128 wide.

    resident: x comes by address; quantises: and in 16 bits, otherwise as E4M3.
    """

    mode: Mode
    resident: bool
    quantises: bool


def payload_nbytes(n: int, k: int) -> int:
    """Bytes of the tiles of a packed [n, k] matrix."""
    return ceil_div(n, TILE) * ceil_div(k, BLOCK_K) * TILE_BYTES


def scales_shape(n: int, k: int, scales: Scales) -> tuple[int, ...]:
    """The float32 scales behind the tiles: one a row, or [K blocks, tiles, 8], each for eight rows of a
    tile.
    """
    tiles = ceil_div(n, TILE)
    return (tiles * TILE,) if scales == "row" else (ceil_div(k, BLOCK_K), tiles, 8)


def packed_nbytes(n: int, k: int, scales: Scales) -> int:
    """Bytes a packed matrix takes, its scales included."""
    return scales_offset(n, k) + 4 * int(np.prod(scales_shape(n, k, scales)))


def scales_offset(n: int, k: int) -> int:
    """Where the scales begin."""
    return ceil_div(payload_nbytes(n, k), ALIGNMENT) * ALIGNMENT


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packs E4M3 bytes [N, K] into tiles; the reference of the pack kernel."""
    n, k = codes.shape
    rows, blocks = ceil_div(n, TILE), ceil_div(k, BLOCK_K)
    padded = np.zeros((rows * TILE, blocks * BLOCK_K), np.uint8)
    padded[:n, :k] = codes
    tiles = padded.reshape(rows, TILE, blocks, 8, 16).transpose(0, 2, 1, 3, 4)
    row, chunk = np.arange(TILE)[:, None], np.arange(8)[None, :]
    return np.ascontiguousarray(tiles[:, :, row, chunk ^ (row % 8)]).reshape(-1)


def segments_of(n: int, k: int) -> int:
    """Into how many segments the sums over K are cut: a function of the weight's shape alone."""
    return common.segments_of(n, ceil_div(k, BLOCK_K))


def activation_pitch(k: int) -> int:
    """Bytes from row to row of quantised activations."""
    return ceil_div(k, BLOCK_K) * BLOCK_K


def plan_fp8(n: int, k: int, tokens: int, dtype: str, sm_count: int, quantised: bool) -> Fp8Plan:
    """Chooses the kernel for y [tokens, n] = x [tokens, k] W^T on an sm_90a GPU.

    n: packed rows that exist, N or `gated_rows`. quantised: whether x is E4M3 already. Raises UsageError
    for a k that is no multiple of 8.
    """
    if dtype not in DTYPES or k % 8 or min(n, k, tokens) < 1:
        raise UsageError(
            f"no FP8 matrix kernel for {dtype} [{tokens}, {k}] x [{n}, {k}]: K must be 8, 16, ..."
        )
    one = segments_of(n, k) == 1
    resident: Mode = "walk_resident" if one else "split_resident"
    size = fit(MODES[resident], tokens)
    if tokens <= size and _fits(resident, n, k, size):
        plan = variant(n, k, tokens, dtype, resident, size, sm_count, "few tokens stay in shared memory")
        if not quantised and tokens * _held_blocks(resident, n, k) <= RESIDENT_UNITS:
            return replace(plan, quantises=True, why="few tokens are quantised on the way in")
        return plan
    why = "rows fill the GPU" if one else "K split over a cluster"
    first: Mode = "walk" if one else "split"
    if tokens <= ONE_TILE:
        return variant(n, k, tokens, dtype, first, fit(MODES[first], tokens), sm_count, why)
    plans = [variant(n, k, tokens, dtype, first, size, sm_count, why) for size in MODES[first][-2:]]
    if not one:
        why = "enough tokens to fill the GPU"
        plans += [variant(n, k, tokens, dtype, "sum", size, sm_count, why) for size in MODES["sum"]]
    for mode in TALL_MODES[one]:
        tiles = ceil_div(n, 2 * TILE) * ceil_div(tokens, 128)
        if mode == "square_pair" and (segments_of(n, k) > MAX_PAIR_SEGMENTS or tiles > sm_count // 2):
            continue
        plans.append(variant(n, k, tokens, dtype, mode, 128, sm_count, "tokens fill the tensor cores' rows"))
    return min(plans, key=lambda plan: _cycles(plan, sm_count))


def _held_blocks(mode: Mode, n: int, k: int) -> int:
    blocks = ceil_div(k, BLOCK_K)
    return widest_segment(blocks, segments_of(n, k)) if is_split(mode) else blocks


def _fits(mode: Mode, n: int, k: int, token_tile: int) -> bool:
    """Whether a kernel's shared memory holds resident activations beside half of its stages."""
    held = _held_blocks(mode, n, k) if is_resident(mode) else 0
    resident = held * token_tile * (BLOCK_K + 4)
    return smem_of(mode, token_tile, held, 6) == smem_of(mode, token_tile, 0, 6) + resident


def _cycles(plan: Fp8Plan, sm_count: int) -> float:
    """A rough count of cycles, for choosing between two ways to do a large product."""
    token_tiles, pairs = ceil_div(plan.tokens, plan.token_tile), ceil_div(plan.rows, 2 * TILE)
    step = max(5.0 * plan.token_tile, (2 * TILE_BYTES + plan.token_tile * (BLOCK_K + 4)) / INFLOW)
    if is_split(plan.mode):
        clusters = max(1, sm_count * 9 // 10 // plan.segments)
        return ceil_div(pairs * token_tiles, clusters) * (ceil_div(plan.blocks, plan.segments) * step + 8000)
    if plan.mode == "square_pair":
        return ceil_div(plan.blocks, 2) * TALL_STEP["square_sum"] + 6000
    if plan.mode in TALL_ROWS:
        units = ceil_div(plan.rows, TALL_ROWS[plan.mode]) * ceil_div(token_tiles, 2)
        return ceil_div(units, sm_count // 2) * (plan.blocks * TALL_STEP[plan.mode] + 3000)
    units = ceil_div(pairs, plan.cluster) * token_tiles
    cycles = ceil_div(units, sm_count // plan.cluster) * (plan.blocks * step + 4000)
    return 0.9 * cycles if plan.mode == "walk" else cycles


def variant(
    n: int,
    k: int,
    tokens: int,
    dtype: str,
    mode: Mode,
    token_tile: int,
    sm_count: int,
    why: str = "asked for",
) -> Fp8Plan:
    """The plan of one given kernel; `walk` needs a weight with one segment."""
    blocks, segments = ceil_div(k, BLOCK_K), segments_of(n, k)
    pairs, token_tiles = ceil_div(n, 2 * TILE), ceil_div(tokens, token_tile)
    resident = is_resident(mode)
    held = _held_blocks(mode, n, k) if resident else 0
    if is_split(mode):
        cluster, grid = segments, (segments, token_tiles, pairs)
        small = n * k <= SMALL_WEIGHT or segments == MAX_SEGMENTS
        most = min(SMALL_STAGES, widest_segment(blocks, segments)) if small else MAX_STAGES
    elif mode == "square_pair":
        cluster, most, grid = 2, MAX_STAGES, (2, token_tiles, pairs)
    elif mode in TALL_ROWS:
        cluster, most = 2, MAX_STAGES
        grid = (2 * min(sm_count // 2, ceil_div(n, TALL_ROWS[mode]) * ceil_div(token_tiles, 2)), 1, 1)
    else:
        cluster, most = cluster_of(mode, token_tile), MAX_STAGES
        grid = resident_grid(n, tokens, token_tile, cluster, sm_count)
    return Fp8Plan(
        kernel=f"sm90_{dtype}_fp8_gemm_{mode}_n{token_tile}",
        mode=mode,
        tokens=tokens,
        rows=n,
        blocks=blocks,
        segments=segments,
        token_tile=token_tile,
        box_rows=token_tile // (1 if is_split(mode) or mode in TALL_ROWS else cluster),
        resident=resident,
        quantises=False,
        grid=grid,
        block=threads_of(mode, token_tile),
        cluster=cluster,
        smem=smem_of(mode, token_tile, held, max(2, most)),
        why=why,
    )


def fp8_arguments(
    plan: Fp8Plan,
    x_map: Any,
    x: int,
    x_scales: int,
    weights: int,
    out: int,
    pitch: int,
    *,
    k: int,
    scales: Scales,
    x_pitch: int,
    bias: int = 0,
    residual: int = 0,
    **epilogue: Any,
) -> list[Any]:
    """A kernel's parameters, in order, for `driver.Launch`.

    x_map: the tensor map of quantised x, in boxes of plan.box_rows x 128 bytes. x: where the plan is
    resident, the address of quantised x, or, where it quantises, of 16-bit x with x_pitch elements from
    row to row. x_scales: float32 [groups of blocks, x_pitch], or 0.
    weights: the packed matrix, scales behind it. The rest: see `ProductPlan.arguments`.
    """
    beside = weights + scales_offset(plan.rows, k)
    return [
        x_map,
        weights,
        beside if scales == "block" else 0,
        beside if scales == "row" else 0,
        x,
        x_scales,
        ctypes.c_int(k),
        ctypes.c_int(x_pitch),
        out,
        bias,
        residual,
        *plan.epilogue_arguments(pitch, **epilogue),
    ]


def plan_widened(n: int, k: int, tokens: int, dtype: str, token_tile: int = 0) -> Fp8Plan:
    """The kernel for GPUs other than sm_90: weights alone are E4M3. token_tile: 0 for the one that fits."""
    token_tile = token_tile or fit(SM80_TOKENS, tokens)
    return Fp8Plan(
        kernel=f"sm80_{dtype}_fp8_gemm_n{token_tile}",
        mode="sm80",
        tokens=tokens,
        rows=n,
        blocks=ceil_div(k, BLOCK_K),
        segments=segments_of(n, k),
        token_tile=token_tile,
        box_rows=0,
        resident=True,
        quantises=False,
        grid=(ceil_div(n, TILE), ceil_div(tokens, token_tile), 1),
        block=128,
        cluster=1,
        smem=sm80_smem(token_tile),
        why="mma.sync, weights widened to 16 bits",
    )


def widened_arguments(
    plan: Fp8Plan,
    x: Any,
    weights: int,
    out: int,
    pitch: int,
    *,
    k: int,
    scales: Scales,
    x_pitch: int,
    **options: Any,
) -> list[Any]:
    """Parameters of a kernel of `plan_widened`; see `fp8_arguments`."""
    found = fp8_arguments(plan, 0, x, 0, weights, out, pitch, k=k, scales=scales, x_pitch=x_pitch, **options)
    return [x, *found[1:4], *found[8:], ctypes.c_int(k), ctypes.c_int(x_pitch)]
