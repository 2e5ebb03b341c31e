// Which tiles of y a block of the matrix kernels for many tokens visits, and in which order.
#pragma once

#include "gemm/gemm.cuh"

namespace rvllm::gemm {

inline constexpr int BOX = 64;  // tokens of one load of x where visits differ in width

// One visit of a block to a tile: 64-row tiles `tile` .. `tile + count - 1`, `width` tokens from token0. A piece
// shares its weights with the other block of the cluster, what is no piece shares its tokens.
struct Visit {
  int tile, count, token0, width;
  bool piece;
};

// The order in which clusters of C blocks, each with another row pair, walk over the matrix.
template <int TOKENS, int C, bool NARROW>
struct Walk {
  static constexpr int GROUP = 16 / C;
  int tiles, tokens, token_tiles, clusters, cluster, rank, full, index = 0;

  __device__ Walk(int rows, int tokens)
      : tiles((rows + TILE - 1) / TILE), tokens(tokens), token_tiles((tokens + TOKENS - 1) / TOKENS),
        clusters(gridDim.x / C), cluster(blockIdx.x / C), rank(blockIdx.x % C), full(tiles / (2 * C * clusters)) {}

  // Whether a group of row pairs has more token tiles than one round takes.
  __device__ bool again() const { return token_tiles > 1 && GROUP * token_tiles > clusters; }

  // With one token tile the last, partial round deals out single tiles when there are enough blocks for
  // that. With several, groups of 16 row pairs pass over all tokens, so that both operands stay in L2.
  // NARROW: the last token tile is as narrow as its tokens allow, in steps of 64. When few tiles are left for the
  // last round, each is dealt out in pieces of 128 or 64 tokens; a cluster then has pieces of one row pair.
  __device__ bool next(Visit& v) {
    const int i = index++;
    v.width = TOKENS;
    v.piece = false;
    if (token_tiles == 1 && !NARROW) {
      const int round = 2 * C * clusters, rest = tiles - full * round;
      v.token0 = 0;
      if (i == full && rest <= round / 2) {
        v.count = 1;
        v.tile = full * round + cluster * C + rank;
        return cluster * C < rest;
      }
      v.count = 2;
      v.tile = ((i * clusters + cluster) * C + rank) * 2;
      return (i * clusters + cluster) * C * 2 < tiles;
    }
    const int supers = (tiles + 2 * C - 1) / (2 * C), units = supers * token_tiles;
    int unit = i * clusters + cluster, place = rank, skip = 0;
    if constexpr (NARROW) {
      // From round to round a cluster goes on by one token tile, so that all get their share of the narrow one.
      const int period = GROUP * token_tiles, ahead = ((GROUP - clusters) % period + period) % period;
      unit = i * clusters + (cluster + i * ahead) % clusters;
      static_assert(C == 2 && TOKENS == 256);
      const int rest = units % clusters, pairs = rest * C, blocks = clusters * C;
      const int pieces = pairs * 4 <= blocks ? 4 : pairs * 2 <= blocks ? 2 : 1;
      if (i == units / clusters && pieces > 1) {
        const int mine = cluster * C + rank;
        if (mine >= pairs * pieces) return false;
        unit = i * clusters + mine / (C * pieces);
        place = mine / pieces % C;
        v.piece = true;
        v.width = TOKENS / pieces;
        skip = mine % pieces * v.width;
      }
    }
    if (unit >= units) return false;
    const int group = unit / (GROUP * token_tiles), within = unit % (GROUP * token_tiles);
    const int height = min(GROUP, supers - group * GROUP);
    v.count = 2;
    v.tile = ((group * GROUP + within % height) * C + place) * 2;
    v.token0 = within / height * TOKENS + skip;
    if (NARROW && !v.piece) v.width = min(TOKENS, (tokens - v.token0 + BOX - 1) / BOX * BOX);
    return true;
  }
};

// 64-row tiles from row_tile on, as many as the scheduler's, and `tile` tokens from token0.
struct WorkTile {
  int row_tile, token0;
};

// Which work tiles a block takes, in which order: clusters stride over units of ROW_TILES row tiles and two token
// tiles; groups of GROUP units along the rows pass over all tokens, so that both operands stay in L2.
template <int ROW_TILES>
struct PairScheduler {
  static constexpr int GROUP = 8;
  int strips, pairs, tile, unit;

  __device__ PairScheduler(int rows, int tokens, int tile)
      : strips((rows + ROW_TILES * TILE - 1) / (ROW_TILES * TILE)), pairs((tokens + 2 * tile - 1) / (2 * tile)), tile(tile),
        unit(blockIdx.x / 2) {}

  __device__ bool next(WorkTile& t) {
    if (unit >= strips * pairs) return false;
    const int group = unit / (GROUP * pairs), within = unit % (GROUP * pairs), height = min(GROUP, strips - group * GROUP);
    t.row_tile = (group * GROUP + within % height) * ROW_TILES;
    t.token0 = (within / height * 2 + static_cast<int>(blockIdx.x % 2)) * tile;
    unit += gridDim.x / 2;
    return true;
  }
};
using TallScheduler = PairScheduler<3>;

// 64-row tiles row_tile and row_tile + 1, `width` tokens from token0.
struct WideTile {
  int row_tile, token0, width;
};

// As TallScheduler: clusters stride over units of four row tiles and one token tile, the last as narrow as its tokens
// allow in steps of 64. The groups that pass over all tokens are equally high, at most MAX_HEIGHT units.
struct WideScheduler {
  static constexpr int MAX_HEIGHT = 8, TOKENS = 256;
  int quads, token_tiles, tokens, height, unit;

  __device__ WideScheduler(int rows, int tokens)
      : quads((rows + 4 * TILE - 1) / (4 * TILE)), token_tiles((tokens + TOKENS - 1) / TOKENS), tokens(tokens),
        unit(blockIdx.x / 2) {
    const int groups = (quads + MAX_HEIGHT - 1) / MAX_HEIGHT;
    height = (quads + groups - 1) / groups;
  }

  __device__ bool next(WideTile& t) {
    if (unit >= quads * token_tiles) return false;
    const int group = unit / (height * token_tiles), within = unit % (height * token_tiles);
    const int high = min(height, quads - group * height);
    t.row_tile = ((group * height + within % high) * 2 + static_cast<int>(blockIdx.x % 2)) * 2;
    t.token0 = within / high * TOKENS;
    t.width = min(TOKENS, (tokens - t.token0 + BOX - 1) / BOX * BOX);
    unit += gridDim.x / 2;
    return true;
  }
};

}  // namespace rvllm::gemm
