"""What a product costs by each way to launch it, in cycles of a multiprocessor: a model, to choose by.

A block's main loop is bound by its tensor cores or by what a multiprocessor takes in from L2; a product also
by the memory's rate. The constants are traced on an H200 (docs/decisions/0011-matrix-kernels.md): 64 of K
with 128 rows take 520, 570, 650, 781 and 1,043 cycles for 96, 128, 160, 192 and 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rvllm.backends.cuda.ops.gemm.common import MANY_TOKENS, ceil_div
from rvllm.kernels.gemm.specs import walk_cluster
from rvllm.kernels.gemm.tiles import TILE, TILE_BYTES

INFLOW = 57.0  # bytes a cycle into one multiprocessor
TENSOR = 2 * 1.1  # cycles for 64 rows, 64 of K and one token: traced 2.04; power lowers the clock
MEMORY = 2576.0  # bytes a cycle from memory to all of them: 4.25 TB/s at 1.65 GHz
WAY_IN_AND_OUT = 4000.0  # cycles of a launch beside its main loop
SPLIT_EXIT = 8000.0  # more, where a cluster adds up
TALL = 1.015  # three warpgroups read more shared memory than two, for the same arithmetic
UNEVEN = 0.4  # how much of the difference between wide and narrow tiles is not evened out among blocks
GPC = 16  # multiprocessors that can form clusters
SHORT = 2  # clusters of four, or of eight, for which small GPCs have no place
EMPTY = 0.45  # what a product by pairs takes longer where its last token tile is empty, against a full one
SEGMENT_END = 1000.0  # what a wide tile takes where running sums are in shared memory
WIDE_EXIT = 9000.0  # of wide tiles' last round, which is stored when nothing is summed beside it
SUM_EXIT = 35.0  # cycles for each token of a tile on its way out of a sum
PIECE = 1.25  # what a narrow piece of a last round takes, against its bytes


@dataclass(frozen=True)
class Work:
    """A product of `rows` x `tokens`, K in `blocks` of 64 and `segments`, on `sms` multiprocessors."""

    rows: int
    tokens: int
    blocks: int
    segments: int
    sms: int

    @property
    def tiles(self) -> int:
        """64-row tiles of the weight."""
        return ceil_div(self.rows, TILE)


def step_cycles(row_tiles: int, tokens: int) -> float:
    """Cycles that a block needs for 64 of K of `row_tiles` 64-row tiles and `tokens` tokens."""
    return max(TENSOR * row_tiles * tokens, (row_tiles * TILE_BYTES + tokens * TILE * 2) / INFLOW)


def cycles(mode: str, token_tile: int, work: Work) -> float:
    """Cycles of the whole product by a mode of the sm_90a kernels with this token tile."""
    by_mode = {"split": _split, "eight": _eight, "pair": _pair, "walk": _walk, "sum": _sum, "flow": _flow,
               "tall": _tall, "wide": _wide}  # fmt: skip
    memory = work.tiles * work.blocks * TILE_BYTES / MEMORY
    return max(memory, by_mode[mode](token_tile, work)) + WAY_IN_AND_OUT


def _clusters(size: int, sms: int) -> int:
    """How many clusters of blocks that need a multiprocessor each fit at once: each lies in one GPC.

    Timed on an H200: 28 clusters of four take one round and 32 take two, so some GPCs have fewer than 16.
    """
    return max(1, sms // GPC * (GPC // size) - (SHORT if size in (4, 8) else 0))


def _split(tile: int, work: Work) -> float:
    clusters = _clusters(work.segments, work.sms)
    waves = ceil_div(ceil_div(work.tiles, 2) * ceil_div(work.tokens, tile), clusters)
    return waves * (ceil_div(work.blocks, work.segments) * step_cycles(2, tile) + SPLIT_EXIT)


def _eight(tile: int, work: Work) -> float:
    """As _split, with two blocks a multiprocessor."""
    return _split(tile, replace(work, sms=2 * work.sms))


def _pair(tile: int, work: Work) -> float:
    waves = ceil_div(ceil_div(work.tiles, 2) * ceil_div(work.tokens, tile), work.sms // 2)
    empty = ceil_div(work.tokens, tile) * tile - work.tokens  # rows of the last token tile
    uneven = 1 + EMPTY * empty / tile
    return uneven * waves * (ceil_div(work.blocks, 2) * step_cycles(2, tile) + SPLIT_EXIT)


def _walk(tile: int, work: Work) -> float:
    if work.tokens > tile:
        return _sum(tile, work)
    # A round of fewer tiles takes what its blocks need, though the memory would be done sooner.
    full, rest = divmod(work.tiles, 2 * work.sms)
    bytes_each = TILE_BYTES / MEMORY
    last = 0.0 if not rest else max(step_cycles(1 if rest <= work.sms else 2, tile), rest * bytes_each)
    return work.blocks * (full * max(step_cycles(2, tile), 2 * work.sms * bytes_each) + last)


def _sum(tile: int, work: Work) -> float:
    """Resident blocks: as many rounds as tiles take."""
    blocks = work.sms // walk_cluster(tile) * walk_cluster(tile)
    rounds = ceil_div(ceil_div(work.tiles, 2) * ceil_div(work.tokens, tile), blocks)
    leaving = SUM_EXIT * tile if work.tokens > MANY_TOKENS else 0.0  # fewer were tuned without it
    return rounds * (work.blocks * step_cycles(2, tile) + leaving)


def _flow(tile: int, work: Work) -> float:
    """As _sum, but the last token tile is narrow and a last round of few tiles is dealt out in pieces."""
    whole, rest = divmod(work.tokens, tile)
    steps = [step_cycles(2, tile)] * whole
    if rest:  # loaded by boxes of 64 tokens, summed by sixteens
        boxes, sixteens = ceil_div(rest, TILE) * TILE, ceil_div(rest, 16) * 16
        loaded = (2 * TILE_BYTES + boxes * TILE * 2) / INFLOW
        steps.append(max(loaded, TENSOR * 2 * max(min(boxes, 128), sixteens)))
    mean = sum(steps) / len(steps)
    mean += UNEVEN * (max(steps) - mean)
    clusters = work.sms // 2
    rounds, left = divmod(ceil_div(work.tiles, 4) * len(steps), clusters)
    last = 0.0
    if left:
        pieces = 4 if left * 4 <= clusters else 2 if left * 2 <= clusters else 1
        last = mean if pieces == 1 else PIECE * step_cycles(2, tile // pieces)
    return work.blocks * (rounds * mean + last)


def _wide(tile: int, work: Work) -> float:
    """As _sum with a narrow last token tile; tiles leave while the next are summed."""
    whole, rest = divmod(work.tokens, tile)
    steps = [step_cycles(2, tile)] * whole
    if rest:
        steps.append(step_cycles(2, ceil_div(rest, TILE) * TILE))
    mean = sum(steps) / len(steps)
    mean += UNEVEN * (max(steps) - mean)
    rounds = ceil_div(ceil_div(work.tiles, 4) * len(steps), work.sms // 2)
    return rounds * (work.blocks * mean + work.segments * SEGMENT_END) + WIDE_EXIT


def _tall(tile: int, work: Work) -> float:
    rounds = ceil_div(ceil_div(work.tiles, 3) * ceil_div(work.tokens, 2 * tile), work.sms // 2)
    return TALL * rounds * work.blocks * step_cycles(3, tile)
