"""The order in which resident blocks visit a matrix, compiled for the CPU: each tile once, in step."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rvllm.backends.cuda.ops.gemm import plan as gemm
from rvllm.kernels import build
from support.emulator import compiler

PROGRAM = """
#include <algorithm>
#define __device__
namespace rvllm::gemm {
using std::min;
constexpr int TILE = 64;
thread_local struct { int x; } gridDim, blockIdx;
}
%s
template <class Walk>
static int walk(int blocks, int block, int rows, int tokens, int* out, int most) {
  using namespace rvllm::gemm;
  gridDim.x = blocks, blockIdx.x = block;
  Walk order(rows, tokens);
  Visit v;
  int count = 0;
  for (; count < most && order.next(v); count++)
    for (int value : {v.tile, v.count, v.token0, v.width, int(v.piece)}) *out++ = value;
  return count;
}
#define ORDER(NAME, ...)                                                                                 \\
  extern "C" int NAME(int blocks, int block, int rows, int tokens, int* out, int most) {                  \\
    return walk<rvllm::gemm::Walk<__VA_ARGS__>>(blocks, block, rows, tokens, out, most);                  \\
  }
extern "C" int tall(int blocks, int block, int rows, int tokens, int tile, int* out, int most) {
  using namespace rvllm::gemm;
  gridDim.x = blocks, blockIdx.x = block;
  TallScheduler order(rows, tokens, tile);
  WorkTile t;
  int count = 0;
  for (; count < most && order.next(t); count++) *out++ = t.row_tile, *out++ = t.token0;
  return count;
}
extern "C" int wide(int blocks, int block, int rows, int tokens, int* out, int most) {
  using namespace rvllm::gemm;
  gridDim.x = blocks, blockIdx.x = block;
  WideScheduler order(rows, tokens);
  WideTile t;
  int count = 0;
  for (; count < most && order.next(t); count++)
    *out++ = t.row_tile, *out++ = t.token0, *out++ = t.width;
  return count;
}
ORDER(flow, 256, 2, true)
ORDER(walk8, 8, 1, false)
ORDER(walk128, 128, 2, false)
"""
MOST = 4000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    gxx = compiler.compiler()
    if gxx is None:
        pytest.skip("no g++ here")
    folder: Path = tmp_path_factory.mktemp("walk")
    header = (build.SOURCES / "gemm/tile_scheduler.cuh").read_text()
    kept = [line for line in header.splitlines() if not line.startswith(("#include", "#pragma"))]
    source = folder / "walk.cpp"
    source.write_text(PROGRAM % "\n".join(kept))
    command = [gxx, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(folder / "walk.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "walk.so"))


def visits(library: ctypes.CDLL, order: str, blocks: int, block: int, rows: int, tokens: int) -> np.ndarray:
    """Visits of one block as rows of tile, count, token0, width, piece."""
    out = np.zeros((MOST, 5), np.int32)
    count = getattr(library, order)(blocks, block, rows, tokens, ctypes.c_void_p(out.ctypes.data), MOST)
    assert count < MOST
    return out[:count]


def cases() -> list[tuple[int, int]]:
    """Shapes of a 7B model and of nobody, each at lucky and unlucky numbers of tokens."""
    rows = [64, 1000, 17003, 37888, 49152, random.randrange(1, 60000)]
    tokens = [1, 63, 129, 192, 256, 257, 384, 512, 600, random.randrange(1, 3000)]
    return [(n, t) for n in rows for t in tokens]


@pytest.mark.parametrize("order", ["flow", "walk8", "walk128"])
def test_every_tile_is_visited_once_and_clusters_stay_in_step(library: ctypes.CDLL, order: str) -> None:
    tile = {"flow": 256, "walk8": 8}.get(order, 128)
    cluster = 1 if order == "walk8" else 2
    for n, t in cases():
        tiles, pairs, token_tiles = -(-n // 64), -(-n // 128), -(-t // tile)
        needed = tiles if token_tiles == 1 else pairs * token_tiles
        blocks = cluster * min(132 // cluster, -(-needed // cluster))
        step = min(tile, 64)
        seen = np.zeros((tiles, -(-t // step)), np.int32)
        for first in range(0, blocks, cluster):
            members = [visits(library, order, blocks, first + i, n, t) for i in range(cluster)]
            assert len({len(m) for m in members}) == 1, (n, t, first)
            for visit in zip(*members, strict=True):
                assert len({(v[1], v[3], v[4]) for v in visit}) == 1  # tiles, width, piece
                if cluster == 2:
                    shared = 0 if visit[0][4] else 2  # a piece shares its weights, others share their tokens
                    assert visit[0][shared] == visit[1][shared], (n, t, visit)
            for row, count, token0, width, _ in np.concatenate(members):
                seen[row : row + count, token0 // step : -(-(token0 + width) // step)] += 1
        assert (seen == 1).all(), (order, n, t, seen.min(), seen.max())


def test_the_last_round_of_few_tiles_is_dealt_out(library: ctypes.CDLL) -> None:
    """A 7B model's gate_up, 2.24 rounds of 256 tokens: two whole visits and a narrow one for most blocks."""
    found = [visits(library, "flow", 132, block, 37888, 256) for block in range(132)]
    assert sorted({len(v) for v in found}) == [2, 3]
    assert {tuple(v[:, 3]) for v in found} == {(256, 256), (256, 256, 64)}
    assert sum(len(v) == 3 for v in found) == 128
    assert gemm.segments_of(37888, 3584) == 1


@pytest.mark.parametrize("tokens", [320, 384, 448, 600, 1100])
def test_narrow_visits_are_shared_out(library: ctypes.CDLL, tokens: int) -> None:
    """No block has more to sum than a whole visit and a narrow one above the average."""
    work = [int(visits(library, "flow", 132, block, 37888, tokens)[:, 3].sum()) for block in range(132)]
    assert max(work) - sum(work) / len(work) <= 256 + 64


@pytest.mark.parametrize("tile", [80, 136, 192])
def test_tall_tiles_are_each_taken_once_and_share_their_rows(library: ctypes.CDLL, tile: int) -> None:
    for n, t in cases():
        triples, token_tiles = -(-n // 192), 2 * -(-t // (2 * tile))
        blocks = 2 * min(66, triples * token_tiles // 2)
        seen = np.zeros((triples, token_tiles), np.int32)
        for first in range(0, blocks, 2):
            members = []
            for block in (first, first + 1):
                out = np.zeros((MOST, 2), np.int32)
                count = library.tall(blocks, block, n, t, tile, ctypes.c_void_p(out.ctypes.data), MOST)
                assert count < MOST
                members.append(out[:count])
            assert np.array_equal(members[0][:, 0], members[1][:, 0])  # whose weights both load half of
            for row, token0 in np.concatenate(members):
                seen[row // 3, token0 // tile] += 1
        assert (seen == 1).all(), (n, t, seen.min(), seen.max())


def test_wide_tiles_are_each_taken_once_and_share_their_tokens(library: ctypes.CDLL) -> None:
    for n, t in [*cases(), (3584, 8192), (4608, 7168)]:
        quads, token_tiles = -(-n // 256), -(-t // 256)
        blocks = 2 * min(66, quads * token_tiles)
        seen = np.zeros((2 * quads, -(-t // 64)), np.int32)
        for first in range(0, blocks, 2):
            members = []
            for block in (first, first + 1):
                out = np.zeros((MOST, 3), np.int32)
                count = library.wide(blocks, block, n, t, ctypes.c_void_p(out.ctypes.data), MOST)
                assert count < MOST
                members.append(out[:count])
            assert np.array_equal(members[0][:, 1:], members[1][:, 1:])  # of which each loads a part for both
            for row, token0, width in np.concatenate(members):
                assert 0 < width <= 256 and width % 64 == 0
                seen[row // 2, token0 // 64 : (token0 + width) // 64] += 1
        assert (seen == 1).all(), (n, t, seen.min(), seen.max())
