"""What the plans of all products share, whatever their weights are stored in: arithmetic on shapes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from rvllm.kernels.gemm.tiles import TILE

Grid = tuple[int, int, int]

MAX_SEGMENTS = 8  # the largest portable cluster
SEGMENT_BLOCKS = 2  # a segment has at least so many blocks of K
REFERENCE_SMS = 132  # segments are cut for this many SMs on every GPU, so that bits do not depend on it
MANY_TOKENS = 512  # above which wide tiles of weights with several segments are thought of
SMALL_STAGES = 6  # of a split product whose time is mostly the way in and out
SMALL_WEIGHT = 20 << 20  # bytes; 24 MB cost StableLM-2-1.6B 4 % of a step


class Kind(IntEnum):
    """What becomes of the sums; the values are those of `Kind` in gemm/gemm.cuh, which defines them."""

    STORE = 0
    LOGITS = 1
    GATED_SILU = 2
    GATED_GELU = 3
    GATED_GELU_TANH = 4
    GATED_CLAMPED = 5  # scale is its alpha, soft_cap its limit
    ACT_SILU = 6
    ACT_GELU = 7
    ACT_GELU_TANH = 8
    ACT_RELU = 9
    ACT_RELU2 = 10


@dataclass(frozen=True, kw_only=True)
class ProductPlan:
    """How one product is launched. The launch takes `grid`, `block`, `cluster` (along x) and `smem`.

    tokens: rows of x; rows: N; blocks: of K, as wide as the kernel takes it. box_rows: rows of the tensor
    map's box of x; 0 where x comes by address.
    """

    kernel: str
    tokens: int
    rows: int
    blocks: int
    segments: int
    token_tile: int
    box_rows: int
    grid: Grid
    block: int
    cluster: int
    smem: int
    why: str

    def arguments(
        self,
        x: Any,
        weights: int,
        out: int,
        pitch: int,
        *,
        bias: int = 0,
        residual: int = 0,
        x_width: int = 0,
        x_pitch: int = 0,
        **epilogue: Any,
    ) -> list[Any]:
        """The kernel's parameters, in order, for `driver.Launch`.

        x: the tensor map of x in boxes of box_rows x 64 elements; without boxes its address, with its width
        and pitch in elements. weights, out, bias, residual: device addresses, 0 for none. pitch, epilogue:
        see `epilogue_arguments`.
        """
        by_address = [] if self.box_rows else [ctypes.c_int(x_width), ctypes.c_int(x_pitch)]
        return [x, weights, out, bias, residual, *self.epilogue_arguments(pitch, **epilogue), *by_address]

    def epilogue_arguments(
        self,
        pitch: int,
        *,
        kind: Kind = Kind.STORE,
        scale: float = 1.0,
        soft_cap: float = 0.0,
        tokens: Any = None,
    ) -> list[Any]:
        """What every kernel is told of its sums, in order: what becomes of them, and how they are cut.

        pitch: elements from row to row of out and residual. tokens: a cell that holds the number of rows to
        write, when that changes between launches of one plan.
        """
        return [
            ctypes.c_int(int(kind)),
            ctypes.c_int(self.tokens) if tokens is None else tokens,
            ctypes.c_int(self.rows),
            ctypes.c_int(pitch),
            ctypes.c_float(scale),
            ctypes.c_float(soft_cap),
            ctypes.c_int(self.blocks),
            ctypes.c_int(self.segments),
        ]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def fit(sizes: tuple[int, ...], tokens: int) -> int:
    """The smallest of these sizes that holds so many tokens, else the largest."""
    return next((size for size in sizes if size >= tokens), sizes[-1])


def segments_of(n: int, blocks: int) -> int:
    """Into how many segments sums over `blocks` blocks of K are cut: a function of the weight's shape alone.

    Enough for about one block of 128 rows and one segment for every SM, at most MAX_SEGMENTS.
    """
    return max(1, min(MAX_SEGMENTS, REFERENCE_SMS // ceil_div(n, 2 * TILE), blocks // SEGMENT_BLOCKS))


def resident_grid(n: int, tokens: int, token_tile: int, cluster: int, sm_count: int) -> Grid:
    """Blocks that stay and take tile after tile: no more than there are, nor than `sm_count` hold."""
    token_tiles = ceil_div(tokens, token_tile)
    needed = ceil_div(n, TILE) if token_tiles == 1 else ceil_div(n, 2 * TILE) * token_tiles
    return cluster * min(max(1, sm_count // cluster), ceil_div(needed, cluster)), 1, 1
