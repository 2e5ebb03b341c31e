"""Matrix products on the GPU: how weights are packed, and which kernel computes y = x W^T for a batch.

Everything here is arithmetic on shapes; nothing touches a device. The kernels are in
`kernels/gemm/gemm_sm90.cu`, `gemm/gemm_sm80.cu` and `gemm/pack.cu`.

Packed weights. W [N, K] becomes tiles of 64 x 64 elements, 8192 bytes each: tile (i, j) at byte
(i * ceil(K / 64) + j) * 8192, row r of a tile at 128 * r, the 16-byte chunk c of a row at 16 * (c ^ (r % 8)).
Missing rows and columns are zeros. A fused gate/up matrix interleaves its two halves by eights first.

Batch invariance. K is cut into `segments_of(N, K)` segments; every kernel sums a segment in one
accumulator and adds the segments in ascending order, so an output's bits do not depend on the batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cuda.ops.gemm import common, cost, sm80
from rvllm.backends.cuda.ops.gemm.common import (
    MANY_TOKENS,
    MAX_SEGMENTS,
    SMALL_STAGES,
    SMALL_WEIGHT,
    ProductPlan,
    ceil_div,
    fit,
    resident_grid,
)
from rvllm.errors import UsageError
from rvllm.kernels.gemm.specs import (
    EIGHT_TOKENS,
    FLOW_TOKENS,
    HALF,
    PAIR_TILES,
    PAIR_TOKENS,
    SPLIT_TOKENS,
    SPLIT_WIDE,
    SUM_TOKENS,
    TALL_TILES,
    TALL_TOKENS,
    WALK_TOKENS,
    WIDE_TOKENS,
    sm90_smem,
    sm90_threads,
    walk_box,
    walk_cluster,
)
from rvllm.kernels.gemm.tiles import DTYPES, TILE, TILE_BYTES

Sm80Mode = Literal["sm80", "sm80_split", "sm80_wide", "sm80_wide_split"]
Mode = Literal["split", "eight", "pair", "walk", "flow", "sum", "tall", "wide", Sm80Mode]
Element = TypeVar("Element", bound=np.generic)

SPLIT_SIZES = (*SPLIT_TOKENS[:-1], *SPLIT_WIDE)  # token tiles of a split product
PAIR_SEGMENTS = 4  # that two blocks share: each has registers for two
MAX_ONE_ROW = 128  # tokens up to which a product is bound by its weights' bytes, in whole rounds
MAX_STAGES = 12  # of a split product's ring
TWO_AN_SM = (
    32  # token tile of which two blocks of clusters of eight share an SM if the ring is a little shorter
)


@dataclass(frozen=True, kw_only=True)
class GemmPlan(ProductPlan):
    """A launch of a kernel for 16-bit weights, whose blocks of K are 64 wide.

    stages: of the ring, and partials: bytes that blocks leave for each other, both of the sm80 modes.
    """

    mode: Mode
    stages: int = 0
    partials: int = 0

    def arguments(self, *args: Any, partials: Any = None, **options: Any) -> list[Any]:
        """See ProductPlan; the kernels for sm_90a are told their token tile too, those for sm_80 their ring.

        partials: address of `self.partials` bytes, of which the counters were zero before the first launch.
        """
        behind: list[Any] = [ctypes.c_int(self.token_tile)]
        if self.stages:
            behind = [ctypes.c_int(self.stages), ctypes.c_void_p(0) if partials is None else partials]
        return [*super().arguments(*args, **options), *behind]


def packed_nbytes(n: int, k: int) -> int:
    """Bytes a packed [n, k] matrix of 16-bit elements takes."""
    return ceil_div(n, TILE) * ceil_div(k, TILE) * TILE_BYTES


def gated_rows(width: int) -> int:
    """Packed rows of a gate/up matrix of `width` gates and `width` ups: both padded to eights."""
    return 2 * 8 * ceil_div(width, 8)


def segments_of(n: int, k: int) -> int:
    return common.segments_of(n, ceil_div(k, TILE))


def pack_matrix(weight: NDArray[Element]) -> NDArray[np.uint8]:
    """Packs W [N, K] of a 16-bit dtype; the reference of the pack kernel. Returns packed_nbytes bytes."""
    n, k = weight.shape
    rows, blocks = ceil_div(n, TILE), ceil_div(k, TILE)
    padded = np.zeros((rows * TILE, blocks * TILE), np.uint16)
    padded[:n, :k] = np.ascontiguousarray(weight).view(np.uint16)
    tiles = padded.reshape(rows, TILE, blocks, 8, 8).transpose(0, 2, 1, 3, 4)  # row tile, block, row, chunk
    row, chunk = np.arange(TILE)[:, None], np.arange(8)[None, :]
    return np.ascontiguousarray(tiles[:, :, row, chunk ^ (row % 8)]).view(np.uint8).reshape(-1)


def interleave_gate_up(gate: NDArray[Element], up: NDArray[Element]) -> NDArray[Element]:
    """Rows of gate and up [width, K] in turns of eight, each padded to eights: [gated_rows(width), K]."""
    width, k = gate.shape
    both = np.zeros((ceil_div(width, 8), 2, 8, k), gate.dtype)
    for half, part in enumerate((gate, up)):
        padded = np.zeros((ceil_div(width, 8) * 8, k), gate.dtype)
        padded[:width] = part
        both[:, half] = padded.reshape(-1, 8, k)
    return both.reshape(-1, k)


def plan_gemm(n: int, k: int, tokens: int, dtype: str, sm_count: int, capability: int = 90) -> GemmPlan:
    """Chooses the kernel for y [tokens, n] = x [tokens, k] W^T on a GPU.

    n: packed rows that exist, N or `gated_rows`. dtype: `bf16` or `f16`. capability: 90 for 9.0.
    Raises UsageError for a k that is no multiple of 8 or a dtype without kernels.
    """
    if dtype not in DTYPES:
        raise UsageError(f"no matrix kernel for dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if k % 8 or min(n, k, tokens) < 1:
        raise UsageError(
            f"no matrix kernel for [{tokens}, {k}] x [{n}, {k}]: the inner size must be 8, 16, ..."
        )
    if capability != 90:
        card = sm80.card_of(capability)
        way = sm80.choose(n, tokens, ceil_div(k, TILE), segments_of(n, k), sm_count, card)
        return _sm80_variant(n, k, tokens, dtype, way, sm_count, card, "mma.sync, the least planned cycles")
    mode, tile = _way(n, k, tokens, sm_count)
    why = "rows fill the GPU" if mode in ("walk", "flow", "tall") else "K split over a cluster"
    if mode == "sum":
        why = "enough tokens to fill the GPU"
    return variant(n, k, tokens, dtype, mode, tile, sm_count, why)


@cache
def _way(n: int, k: int, tokens: int, sm_count: int) -> tuple[Mode, int]:
    """The mode and token tile that cost a product least."""
    work = cost.Work(n, tokens, ceil_div(k, TILE), segments_of(n, k), sm_count)
    return min(ways_of(work.segments, tokens), key=lambda way: cost.cycles(way[0], way[1], work))


def planned_cycles(n: int, k: int, tokens: int, sm_count: int) -> float:
    """Cycles of a multiprocessor that y [tokens, n] = x [tokens, k] W^T is planned to take on sm_90a."""
    mode, tile = _way(n, k, tokens, sm_count)
    return cost.cycles(mode, tile, cost.Work(n, tokens, ceil_div(k, TILE), segments_of(n, k), sm_count))


def ways_of(segments: int, tokens: int) -> list[tuple[Mode, int]]:
    """The modes and token tiles worth a thought for a product of so many tokens."""
    if tokens <= MAX_ONE_ROW:
        one_round: list[tuple[Mode, int]] = [("walk" if segments == 1 else "split", fit(WALK_TOKENS, tokens))]
        if segments == 1 and TALL_TILES[0] < tokens <= 2 * TALL_TILES[0]:  # wider ones gain nothing in a step
            one_round.append(("tall", TALL_TILES[0]))
        if segments == MAX_SEGMENTS and one_round[0][1] in EIGHT_TOKENS:
            one_round.append(("eight", one_round[0][1]))
        return one_round
    modes: list[Mode] = ["flow", "tall"] if segments == 1 else ["split", "sum"]
    if segments == 1 and tokens <= WALK_TOKENS[-1]:
        modes.append("walk")
    if segments > 1 and tokens > MANY_TOKENS:
        modes.append("wide")
    if segments == PAIR_SEGMENTS and tokens <= 2 * PAIR_TILES[-1]:
        modes.append("pair")
    return [(mode, tile) for mode in modes for tile in token_tiles(mode) if tile >= min(64, tokens)]


def token_tiles(mode: Mode) -> tuple[int, ...]:
    """The token tiles that a mode's sm_90a kernels can be launched with."""
    tiles: dict[Mode, tuple[int, ...]] = {
        "split": SPLIT_SIZES,
        "eight": EIGHT_TOKENS,
        "pair": PAIR_TILES,
        "walk": WALK_TOKENS,
        "flow": FLOW_TOKENS,
        "sum": SUM_TOKENS,
        "tall": TALL_TILES,
        "wide": WIDE_TOKENS,
    }
    return tiles[mode]


def variant(
    n: int,
    k: int,
    tokens: int,
    dtype: str,
    mode: Mode,
    token_tile: int,
    sm_count: int,
    why: str = "asked for",
    capability: int = 80,
) -> GemmPlan:
    """The plan of one given kernel; `walk`, `flow` and `tall` need a weight with one segment.

    capability: of the GPU that an sm80 mode's shared memory is for.
    """
    if mode.startswith("sm80"):
        way = sm80.way_of(mode, token_tile)
        return _sm80_variant(n, k, tokens, dtype, way, sm_count, sm80.card_of(capability), why)
    blocks, segments = ceil_div(k, TILE), segments_of(n, k)
    pairs, token_tiles = ceil_div(n, 2 * TILE), ceil_div(tokens, token_tile)
    box_rows = token_tile
    compiled = _kernel_tokens(mode, token_tile)
    name, block = f"sm90_{dtype}_gemm_{mode}_n{compiled}", sm90_threads(mode, compiled)
    smem = sm90_smem(mode, token_tile)
    if mode == "split":
        smem = sm90_smem(mode, token_tile, _split_stages(n, k, token_tile))
    if mode in ("split", "eight", "pair"):
        cluster = 2 if mode == "pair" else segments
        grid = (cluster, token_tiles, pairs)
    elif mode in ("tall", "wide"):
        cluster = 2
        row_tiles, together = (3, 2) if mode == "tall" else (4, 1)
        units = ceil_div(n, row_tiles * TILE) * ceil_div(tokens, together * token_tile)
        grid = (2 * min(max(1, sm_count // 2), units), 1, 1)
        box_rows = token_tile if mode == "tall" else walk_box(mode, token_tile)
    else:
        cluster, box_rows = walk_cluster(token_tile), walk_box(mode, token_tile)
        grid = resident_grid(n, tokens, token_tile, cluster, sm_count)
    return GemmPlan(
        kernel=name,
        mode=mode,
        tokens=tokens,
        rows=n,
        blocks=blocks,
        segments=segments,
        token_tile=token_tile,
        box_rows=box_rows,
        grid=grid,
        block=block,
        cluster=cluster,
        smem=smem,
        why=why,
    )


def _sm80_variant(
    n: int, k: int, tokens: int, dtype: str, way: sm80.Way, sm_count: int, card: sm80.Card, why: str
) -> GemmPlan:
    """The plan of a way of the sm_80 kernel."""
    tile, segments = way.tile, segments_of(n, k)
    if not sm80.can_run(way, segments):
        raise ValueError(f"{way.mode}:{tile.tokens} cannot sum {segments} segments")
    grid = sm80.grid_of(way, n, tokens, segments)
    stages, _ = sm80.stages_of(tile, card.smem, ceil_div(grid[0] * grid[1] * grid[2], sm_count))
    mode: dict[str, Mode] = {m: m for m in get_args(Sm80Mode)}
    return GemmPlan(
        kernel=f"sm80_{dtype}_gemm_r{tile.rows}_n{tile.tokens}",
        mode=mode[way.mode],
        tokens=tokens,
        rows=n,
        blocks=ceil_div(k, TILE),
        segments=segments,
        token_tile=tile.tokens,
        box_rows=0,
        grid=grid,
        block=tile.threads,
        cluster=1,
        smem=stages * tile.stage,
        why=why,
        stages=stages,
        partials=sm80.partial_bytes(way, n, tokens, segments),
    )


def way_named(name: str) -> tuple[Mode, int]:
    """The mode and token tile of a name such as `split:128`; KeyError or ValueError for others."""
    mode, _, tile = name.partition(":")
    found: dict[str, Mode] = {m: m for m in get_args(Mode)}
    return found[mode], int(tile)


def _kernel_tokens(mode: Mode, token_tile: int) -> int:
    """The token tile in the name of the kernel that runs tiles of this size."""
    if mode in ("tall", "pair"):
        return fit(TALL_TOKENS if mode == "tall" else PAIR_TOKENS, token_tile)
    return SPLIT_TOKENS[-1] if mode == "split" and token_tile in SPLIT_WIDE else token_tile


def _split_stages(n: int, k: int, token_tile: int) -> int:
    """Stages of a split product: few for a small weight, whose time is mostly the way in and out.

    Two kernels' blocks then share an SM, and the next weights arrive while these sums are added up. A large
    one wants all of the shared memory, to keep enough loads in flight.
    """
    if segments_of(n, k) == MAX_SEGMENTS and token_tile == TWO_AN_SM:
        return HALF
    small = 2 * n * k <= SMALL_WEIGHT or segments_of(n, k) == MAX_SEGMENTS
    return min(SMALL_STAGES, ceil_div(ceil_div(k, TILE), segments_of(n, k))) if small else MAX_STAGES


class Interleave(IntEnum):
    """Where the pack kernel puts a part's rows: in order, or as the gates or ups of a gated matrix."""

    PLAIN = 0
    GATE = 1
    UP = 2


def pack_arguments(
    source: int,
    packed: int,
    rows: int,
    k: int,
    *,
    first: int = 0,
    padded_rows: int | None = None,
    row_stride: int | None = None,
    column_stride: int = 1,
    interleave: Interleave = Interleave.PLAIN,
) -> list[Any]:
    """Parameters of `sm80_*_gemm_pack_*`: source [rows, k] into the packed matrix from row `first` on.

    Strides are in elements. Rows from `rows` up to `padded_rows` are filled with zeros; by default the part
    is padded to eights when interleaved and not at all when plain. The last plain part of a matrix has to
    be padded so that first + padded_rows is a multiple of 64. Grid and block are free: threads stride.
    """
    if padded_rows is None:
        padded_rows = rows if interleave == Interleave.PLAIN else 8 * ceil_div(rows, 8)
    return [
        source,
        packed,
        ctypes.c_int64(rows),
        ctypes.c_int64(padded_rows),
        ctypes.c_int(k),
        ctypes.c_int64(k if row_stride is None else row_stride),
        ctypes.c_int64(column_stride),
        ctypes.c_int(ceil_div(k, TILE)),
        ctypes.c_int64(first),
        ctypes.c_int(int(interleave)),
    ]
