"""Which tiles the entries of an experts' step are cut into: what costs least, for choices that are even.

A spread is experts, and entries of each of them: those that are routed to, then those that every token has.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rvllm.backends.cuda.device.info import DeviceInfo
from rvllm.kernels.gemm.tiles import TILE
from rvllm.kernels.moe.specs import (
    BLOCKS,
    GROUPED_TOKENS,
    QUANTISED_TOKENS,
    QUANTISED_WIDE,
    WIDE,
    Block,
)

Spread = tuple[tuple[float, int], ...]
EVEN = 16  # as in `sort`
ONE_SMALL = 26  # entries, with room for chance, up to which hardly an expert has two small tiles
SMALL_TILES = (
    1.3  # of an expert that cost what a wide one does: 217 and 290 us a layer of 128 experts on an H200
)


def spread(tokens: int, experts: int, top_k: int, always: int) -> Spread:
    """Of a step of `tokens` tokens with `top_k` of `experts` experts each, with room for chance.

    always: of both, those that every token has.
    """
    routed = experts - always
    mean = tokens * (top_k - always) / routed
    hit = routed * (1 - (1 - (top_k - always) / routed) ** tokens)
    return (hit, min(tokens, math.ceil(mean + 3 * mean**0.5))), (always, tokens)


def even_tile(entries: int, tile: int) -> int:
    """Entries of the tiles, of up to `tile`, that `sort` cuts so many entries of one expert into."""
    share = -(-entries // -(-entries // tile)) if entries else 0
    return min(tile, -(-share // EVEN) * EVEN)


def _cost(of: Spread, tile: int, cycles: Callable[[int], float], read: float) -> tuple[float, float]:
    """To compare tiles of so many entries by: cycles for 64 of K and a tile's rows, of all experts.

    cycles: of one tile of so many entries whose operands lie in L2; read: of one expert's weights from
    memory.
    """
    summed = fetched = 0.0
    for experts, each in of:
        width = even_tile(each, tile) if tile == WIDE else tile
        summed += experts * -(-each // tile) * cycles(width)
        fetched += experts * read
    return max(summed, fetched), summed


def block_of(of: Spread, chip: DeviceInfo) -> Block:
    """What costs `many` least, by an A100's 52 bytes a cycle from L2, 13 from memory, and 2,048 FLOPs."""
    fit = [b for b in BLOCKS if b.smem <= chip.smem_per_block]

    def cost(block: Block) -> tuple[float, float]:
        moved, multiplied = (block.rows + block.tokens) * 128 / 52, block.rows * block.tokens / 16
        strips = block.rows / TILE
        return _cost(of, block.tokens, lambda _: max(moved, multiplied) / strips, TILE * 128 / 13)

    return min(fit, key=cost)


def tile_of(of: Spread, entries: int, up_rows: int) -> int:
    """What costs `grouped` least, by an H200's 56 bytes a cycle from L2, 19 from memory, 4,096 FLOPs.

    Tiles whose rows are gathered on the way take 9 cycles an entry at least; rows of wide ones are gathered
    before, once for all of the up matrix's `up_rows` packed rows.
    """
    pairs = -(-up_rows // (2 * TILE))

    def cost(tile: int) -> tuple[float, float]:
        entry = 4 if tile == WIDE else 9
        longest, summed = _cost(
            of, tile, lambda width: max((2 * TILE + width) * 128 / 56, entry * width), 2 * TILE * 128 / 19
        )
        gathered = entries * TILE * 2 / 19 / pairs if tile == WIDE else 0.0
        return longest + gathered, summed

    return min((*GROUPED_TOKENS, WIDE), key=cost)


def quantised_tile_of(of: Spread, capability: int) -> int:
    """Entries of a work tile of `quantised`, or of `quantised_wide` on Hopper.

    The small tile while most experts have no more entries than it: weights are decoded for each tile.
    """
    small = QUANTISED_TOKENS[0]
    hit = sum(experts for experts, _ in of)
    tiles = sum(experts * (1 if each <= ONE_SMALL else -(-each // small)) for experts, each in of)
    if tiles <= SMALL_TILES * hit:
        return small
    return QUANTISED_WIDE if capability == 90 else QUANTISED_TOKENS[1]
