"""Products on GPUs without wgmma: which token tile, whether K is split, how deep a ring, at what cost.

Nothing here has been timed on such a card. The costs rank ways to launch a product, by arithmetic on what
is published of each generation: the CUDA programming guide's table of compute capabilities, data sheets,
NVIDIA's white papers (multiply-adds of mma.sync with float32 sums, a cycle and multiprocessor: 1,024 of
GA100; 256 of GeForce cards and 512 of others with GA102, AD102, GB202) and measurements of L2 (5 TB/s of an
A100 and of an RTX 4090).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from rvllm.backends.cuda.ops.gemm.common import ceil_div
from rvllm.backends.cuda.ops.gemm.cost import Work
from rvllm.kernels.gemm.specs import MAX_RING, MAX_SPLIT_TILES, MMA_TILES, MmaTile
from rvllm.kernels.gemm.tiles import TILE, TILE_BYTES

TOGETHER = 1024  # tokens that neighbouring blocks take with the same rows
MAX_SPLIT_TOKENS = 512  # beyond, output tiles fill any of these GPUs
FEW_STAGES = 3  # of a ring; with fewer, blocks do not share a multiprocessor

TENSOR = 1.15  # what good mma.sync kernels take beside the tensor cores' own time
MEMORY = 1.08  # what reads take beside the memory's own time
OVERLAP = 0.15  # of what does not bound the main loop, what shows all the same
PULL = 20.0  # bytes a cycle that one multiprocessor gets from memory by itself
SHARED = 128.0  # bytes a cycle of its shared memory
STEP = 300.0  # cycles from barrier to barrier of one block that waits for nothing else
LATENCY = 1500.0  # cycles from a copy's issue to its arrival, with the memory busy
LEAVE = 0.2  # cycles an output, through shared memory and out
SPLIT_EXIT = 2000.0  # cycles of a counter's round trip and two more barriers
WAY_IN_AND_OUT = 4000.0  # cycles of a launch beside its main loop


@dataclass(frozen=True)
class Card:
    """What of a generation decides.

    smem: bytes a block may have; fmas: of mma.sync a cycle, with float32 sums; l2, memory: bytes a cycle. The
    latter three are of one multiprocessor's share.
    """

    smem: int
    fmas: int
    l2: float
    memory: float


# By the lowest compute capability. Of 8.6 and 8.9 multiply-adds are between GeForce's and those of others:
# choices by GeForce's cost an L40S up to 23 % of the planned time, these up to 15 %, mostly below 2 %.
CARDS = {
    80: Card(166_912, 1024, 40.0, 13.4),  # A100: 2.04 TB/s at 1.41 GHz
    86: Card(101_376, 384, 16.0, 6.7),  # RTX 3090: 0.94 TB/s at 1.70 GHz
    89: Card(101_376, 384, 16.0, 3.1),  # RTX 4090: 1.01 TB/s at 2.52 GHz
    100: Card(232_448, 1024, 40.0, 28.0),  # B200: 8 TB/s at 1.9 GHz
    120: Card(101_376, 256, 16.0, 4.4),  # RTX 5090: 1.79 TB/s at 2.41 GHz
}


def card_of(capability: int) -> Card:
    """The card of a compute capability's generation; of one that is not known, of the one before."""
    return CARDS[max(known for known in CARDS if known <= capability)]


@dataclass(frozen=True)
class Way:
    """A mode of gemm_sm80.cu. split: each segment of K has blocks of its own."""

    tile: MmaTile
    split: bool

    @property
    def mode(self) -> str:
        """As `plan.Mode` names it."""
        (name,) = (name for name, tiles in MMA_TILES.items() if self.tile in tiles)
        return f"{name}_split" if self.split else name


def way_of(mode: str, token_tile: int) -> Way:
    """The way of a mode's name and token tile; KeyError or ValueError where there is none."""
    tiles = MMA_TILES[mode.removesuffix("_split")]
    (tile,) = (tile for tile in tiles if tile.tokens == token_tile)
    return Way(tile, mode.endswith("_split"))


def can_run(way: Way, segments: int) -> bool:
    """Whether a way can sum a weight of so many segments."""
    return segments > 1 if way.split else segments == 1 or way.tile.keeps


def ways_of(segments: int, tokens: int) -> list[Way]:
    """All ways worth a thought for so many tokens: no tile that half of would do."""
    splits = (False, True) if tokens <= MAX_SPLIT_TOKENS else (False,)
    found = [Way(tile, split) for tiles in MMA_TILES.values() for tile in tiles for split in splits]
    most = max(8, 2 * tokens - 1)
    return [way for way in found if way.tile.tokens <= most and can_run(way, segments)]


def stages_of(tile: MmaTile, smem: int, each: int) -> tuple[int, int]:
    """(stages of the ring, blocks that share a multiprocessor) on a GPU whose blocks may have `smem` bytes.

    each: blocks that the launch has for each multiprocessor; where they are few, their rings are deeper. A
    multiprocessor has 1 KB more than a block may have, and keeps 1 KB of each block for itself.
    """
    for blocks in range(min(tile.blocks, each), 0, -1):
        stages = ((smem + 1024) // blocks - 1024) // tile.stage
        if stages >= FEW_STAGES:
            return min(MAX_RING, stages), blocks
    return 2, 1


def grid_of(way: Way, rows: int, tokens: int, segments: int) -> tuple[int, int, int]:
    """The grid that covers a product; see gemm_sm80.cu."""
    token_tiles = ceil_div(tokens, way.tile.tokens)
    together = min(token_tiles, TOGETHER // way.tile.tokens)
    row_tiles = ceil_div(rows, way.tile.rows)
    return row_tiles * together, ceil_div(token_tiles, together), segments if way.split else 1


def partial_bytes(way: Way, rows: int, tokens: int, segments: int) -> int:
    """Bytes of counters and of sums that the blocks of a split product leave for each other; 0 of others."""
    if not way.split:
        return 0
    tiles = ceil_div(rows, way.tile.rows) * ceil_div(tokens, way.tile.tokens)
    return 4 * (MAX_SPLIT_TILES + tiles * segments * way.tile.rows * way.tile.tokens)


def most_partial_bytes(rows: int, segments: int) -> int:
    """What suffices for every way and number of tokens that `ways_of` thinks of."""
    wide = ceil_div(rows, 2 * TILE) * 2 * TILE
    return 4 * (MAX_SPLIT_TILES + wide * MAX_SPLIT_TOKENS * segments) if segments > 1 else 0


def step_cycles(tile: MmaTile, card: Card) -> float:
    """Cycles of a multiprocessor for 64 of K of one block: of tensor cores, shared memory and L2."""
    tensor = TENSOR * tile.rows * tile.tokens * TILE / card.fmas
    read = tile.rows * tile.token_warps + tile.tokens * tile.row_warps  # by ldmatrix
    shared = (read + tile.rows + tile.tokens) * TILE * 2 / SHARED
    parts = tensor, shared, tile.stage / card.l2
    return max(parts) + OVERLAP * (sum(parts) - max(parts))


def cycles(way: Way, work: Work, card: Card) -> float:
    tile, splits = way.tile, work.segments if way.split else 1
    token_tiles, outputs = ceil_div(work.tokens, tile.tokens), tile.rows * tile.tokens
    units, deep = ceil_div(work.rows, tile.rows) * token_tiles * splits, ceil_div(work.blocks, splits)
    each = ceil_div(units, work.sms)
    stages, resident = stages_of(tile, card.smem, each)
    busy = each * (deep * step_cycles(tile, card) + LEAVE * outputs)
    alone = ceil_div(each, resident) * deep * max(STEP, LATENCY / (stages - 1))
    exit_cycles = 0.0
    if way.split:
        exit_cycles = SPLIT_EXIT + (each + splits) * outputs * 4 / card.l2
    passes = ceil_div(token_tiles, max(1, TOGETHER // tile.tokens))
    moved = work.tiles * work.blocks * TILE_BYTES * passes + 2 * work.tokens * (
        work.blocks * TILE + work.rows
    )
    in_flight = min(units, resident * work.sms) * (stages - 1) * tile.stage / LATENCY
    memory = MEMORY * moved / min(card.memory * work.sms, PULL * min(units, work.sms), in_flight)
    return max(busy, alone, memory) + exit_cycles + WAY_IN_AND_OUT


@cache
def choose(rows: int, tokens: int, blocks: int, segments: int, sms: int, card: Card) -> Way:
    """The way that costs a product least."""
    work = Work(rows, tokens, blocks, segments, sms)
    return min(ways_of(segments, tokens), key=lambda way: cycles(way, work, card))
