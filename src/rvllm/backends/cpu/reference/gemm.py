"""x @ weight.T whose every row has the same bits whatever rows stand beside it.

BLAS sums an element in an order that depends on the shape of the whole call. Here the shape never
varies: x is cut into tiles of a fixed number of rows (the last one padded with zeros), the weight into
chunks of a fixed number of its rows, and every tile meets every chunk in a call of its own; one
`np.matmul` over stacked operands makes all those calls. docs/decisions/0003-cpu-batch-invariance.md has
the measurements behind the sizes.
"""

from __future__ import annotations

import importlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rvllm.backends.cpu.threads import Workers

F32 = NDArray[np.float32]

TILE = 4  # rows of x a call takes
CALL = 1_000_000  # multiply-adds up to which OpenBLAS multiplies without repacking its operands
CACHED = 768 << 10  # bytes of weight that all tiles meet before the next are touched: most of a core's L2
SPREAD = 1 << 18  # multiply-adds that are worth waking another thread


@cache
def tile_rows() -> int:
    """Rows a call takes on this machine: TILE with AVX-512, else 1.

    Only there does OpenBLAS have kernels that multiply a few rows without repacking the weight; elsewhere
    one row at a time (a matrix-vector product) streams it fastest.
    """
    core = importlib.import_module("numpy._core._multiarray_umath")
    return TILE if getattr(core, "__cpu_features__", {}).get("AVX512_SKX", False) else 1


def chunk_rows(inner: int, tile: int) -> int:
    """Rows of the weight a call takes, for rows of `inner` elements."""
    return min(128, max(16, CALL // (tile * inner) // 16 * 16))


def product(x: F32, weight: F32, workers: Workers) -> F32:
    """x [T, K] @ weight [N, K].T, float32 [T, N]."""
    tile = tile_rows()
    rows, inner = x.shape
    tiles = -(-rows // tile)
    padded = tiles * tile
    if padded != rows:
        wider = np.zeros((padded, inner), dtype=np.float32)
        wider[:rows] = x
        x = wider
    out = np.empty((padded, len(weight)), dtype=np.float32)
    stack = np.ascontiguousarray(x).reshape(1, tiles, tile, inner)
    chunk = chunk_rows(inner, tile)
    whole = len(weight) // chunk

    group = max(1, min(CACHED // (chunk * inner * 4), -(-whole // (2 * workers.count))))

    def multiply(item: int) -> None:
        begin, end = item * group * chunk, min((item + 1) * group, whole) * chunk
        # A long dot product streams memory at full speed, the small products that follow do not: it is
        # here to bring the group into the cache.
        flat = weight[begin:end].reshape(-1)
        np.dot(flat, flat)
        _stacked(stack, weight, out, begin, end, chunk)

    groups = -(-whole // group)
    if padded * weight.size >= SPREAD:
        workers.each(groups, multiply)
    else:
        for item in range(groups):
            multiply(item)
    if whole * chunk < len(weight):
        _stacked(stack, weight, out, whole * chunk, len(weight), len(weight) - whole * chunk)
    return out[:rows]


def _stacked(stack: F32, weight: F32, out: F32, low: int, high: int, chunk: int) -> None:
    """Rows low .. high - 1 of the weight, `chunk` in a call, against every tile of the stack."""
    _, tiles, tile, inner = stack.shape
    chunks = (high - low) // chunk
    parts = weight[low:high].reshape(chunks, 1, chunk, inner).swapaxes(2, 3)
    target = out[:, low:high].reshape(tiles, tile, chunks, chunk).transpose(2, 0, 1, 3)
    np.matmul(stack, parts, out=target)


def same_at_every_position(inner: int, outer: int) -> bool:
    """Whether a row of `inner` elements gets the same bits at every place of a tile on this machine."""
    tile = tile_rows()
    chunk = chunk_rows(inner, tile)
    source = np.random.default_rng(inner)
    for count in {chunk if outer >= chunk else 0, outer % chunk} - {0}:
        weight = source.standard_normal((count, inner), dtype=np.float32)
        row = source.standard_normal((1, inner), dtype=np.float32)
        out = np.matmul(np.repeat(row, tile, axis=0), weight.T)
        if any(not np.array_equal(out[0], other) for other in out[1:]):
            return False
    return True
