// Which tiles of y a resident block visits, and in which order.
#pragma once

#include "gemm/gemm.cuh"

namespace rvllm::gemm {

// 64-row tiles `tile` .. `tile + count - 1`, tokens from token0 on.
struct WorkTile {
  int tile, count, token0;
};

template <int TOKENS>
struct Tiles {
  static constexpr int GROUP = 16;  // row pairs that pass over all tokens together, so that both operands stay in L2
  int tiles, token_tiles, blocks, block, index = 0;

  __device__ Tiles(int tiles, int tokens)
      : tiles(tiles), token_tiles((tokens + TOKENS - 1) / TOKENS), blocks(gridDim.x), block(blockIdx.x) {}

  // Whether weights are read again in a later round, for other tokens.
  __device__ bool again() const { return token_tiles > 1 && GROUP * token_tiles > blocks; }

  // The last, partial round deals out single tiles when there are enough blocks for that.
  __device__ bool next(WorkTile& v) {
    const int i = index++;
    if (token_tiles == 1) {
      const int full = tiles / (2 * blocks), rest = tiles - full * 2 * blocks;
      v.token0 = 0;
      if (i == full && rest <= blocks) {
        v.count = 1;
        v.tile = full * 2 * blocks + block;
        return block < rest;
      }
      v.count = 2;
      v.tile = (i * blocks + block) * 2;
      return v.tile < tiles;
    }
    const int pairs = (tiles + 1) / 2, units = pairs * token_tiles, full = units / blocks * blocks;
    int unit = i * blocks + block;
    const bool single = full > 0 && unit >= full && 2 * (units - full) <= blocks;  // of the last round: two blocks a pair
    if (single) unit = full + block / 2;
    if (unit >= units || i > full / blocks) return false;
    const int group = unit / (GROUP * token_tiles), within = unit % (GROUP * token_tiles);
    const int height = min(GROUP, pairs - group * GROUP);
    v.count = 2;
    v.tile = (group * GROUP + within % height) * 2;
    v.token0 = within / height * TOKENS;
    if (single) {
      v.count = 1;
      v.tile += block % 2;
    }
    return v.tile < tiles;
  }
};

}  // namespace rvllm::gemm
