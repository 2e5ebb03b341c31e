"""What the kernels and those who call them agree on: slots of a step, sizes of shared pieces.

The package's build imports it before any dependency is there.
"""

from __future__ import annotations

from rvllm.kernels.constants import constants

LANES = 16  # rows of a tile, elements of a vector
BLOCK = constants("attention/kv_block.cuh")["KV_BLOCK"]  # tokens of a cache block
# Slots of a step (see `step.NativeStep`): what the kernels know of the batch.
TOKENS, SAMPLES, IDS, POSITIONS, PLACES, TABLES, TABLE_WIDTH, SEQUENCE, WANTED = range(9)
HEADS_ACROSS = 4  # heads of a group that attention computes side by side
BLOCK_ROWS = 128  # most rows of a chunk, those of x that meet a tile of weights while its panel is in cache
# The rows of a product as chunks: how many chunks, how many rows, then CHUNK numbers for each: its expert,
# its first row and its rows.
CHUNK_COUNT, CHUNK_ROWS, CHUNK_FIRST = 0, 1, 2
CHUNK = 3
PIECE = 3  # numbers of an expert's rows in a weight: their address, how many, the first element of the output
SUM_GROUP = 32  # elements of a group of every format with a minimum
