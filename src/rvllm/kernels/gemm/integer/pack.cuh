// Writes levels and scales into chunks (see gemm/integer/formats.cuh), from wherever they come.
#pragma once

#include "gemm/integer/formats.cuh"

namespace rvllm::gemm {

// Where source row i of a part goes. PLAIN keeps the order; GATE and UP interleave two matrices by eights.
enum Interleave : int { PLAIN = 0, GATE = 1, UP = 2 };

// Packed rows that a launch writes: those of source rows 0 .. padded - 1, from packed row `first` (a multiple of 8, and
// of 16 where interleaved) on; what lies behind the real `rows` becomes zeros.
struct Rows {
  long long first, rows, padded;
  int interleave;

  // The source row that packed row r is of; -1 for none of this launch's.
  __device__ long long source(long long r) const {
    long long i = r - first;
    if (i < 0) return -1;
    if (interleave != PLAIN) {
      if ((i % 16 >= 8) != (interleave == UP)) return -1;
      i = i / 16 * 8 + i % 8;
    }
    return i < padded ? i : -1;
  }
  __device__ long long packed_end() const { return interleave == PLAIN ? first + padded : first + padded * 2; }
};

// One plane's share of one thread: `BITS` of each level from bit SHIFT on, of the rows in `mine` (bit 0: row, bit 1: row +
// 8); the other row's levels stay as they are.
template <int BITS, int SHIFT>
__device__ __forceinline__ void write_plane(u8* at, const u8 (&levels)[4][8], int mine) {
  constexpr int WORDS = BITS;  // 32 levels of BITS bits
  u32 words[WORDS] = {}, mask[WORDS] = {};
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < 8; i++) {  // place i: byte i / 2 of the row's four, h = i % 2
      const int b = i / 2, h = i % 2;
      int word, bit;
      if constexpr (BITS == 4)
        word = j, bit = 4 * i;
      else if constexpr (BITS == 2)
        word = j / 2, bit = 8 * b + 4 * (j % 2) + 2 * h;
      else if constexpr (BITS == 1)
        word = 0, bit = 8 * b + 2 * j + h;
      else
        word = 4 * h + j, bit = 8 * b;
      constexpr u32 ALL = (1u << BITS) - 1;
      words[word] |= (levels[j][i] >> SHIFT & ALL) << bit;
      if (mine >> h & 1) mask[word] |= ALL << bit;
    }
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    u32* to = reinterpret_cast<u32*>(at) + (BITS == 8 && w >= 4 ? 512 + w - 4 : w);
    *to = mine == 3 ? words[w] : (*to & ~mask[w]) | (words[w] & mask[w]);
  }
}

// source.level(row, column): the level as the layout has it. source.word(row, first column of a run): its word of scales.
// Columns from K on are the source's to answer for. Any grid of any block size does.
template <class F, int BITS, class Source>
__device__ __forceinline__ void pack_rows(u8* packed, const Rows& rows, int chunks, const Source& source) {
  constexpr int RUN = CHUNK_K / F::RUNS;
  const long long tile0 = rows.first / TILE, tiles = (rows.packed_end() + TILE - 1) / TILE - tile0;
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x, me = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x;
  for (u64 i = me; i < tiles * chunks * 256ull; i += step) {  // a thread's share of a unit
    const int t = i % 128, u = i / 128 % 2;
    const long long chunk = i / 256 % chunks, tile = tile0 + i / 256 / chunks;
    const long long row = tile * TILE + t / 32 * 16 + t % 32 / 4;
    const long long from[2] = {rows.source(row), rows.source(row + 8)};
    const int mine = (from[0] >= 0) | (from[1] >= 0) << 1;
    if (!mine) continue;
    u8 levels[4][8];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int p = 0; p < 8; p++) {  // place p: row p % 2, column 2 (t % 4) + p / 4, eight further for registers 2 and 3
        const int column = chunk * CHUNK_K + u * 64 + j * 16 + t % 4 * 2 + p / 4 + p % 4 / 2 * 8;
        const long long r = from[p % 2];
        levels[j][p] = r >= 0 && r < rows.rows ? source.level(r, column) : 0;
      }
    u8* const unit = packed + (tile * chunks + chunk) * F::CHUNK + F::SCALES + u * F::UNIT;
    if constexpr (BITS == 8) {
      write_plane<8, 0>(unit + t * 16, levels, mine);
    } else {
      if constexpr (BITS >= 4) write_plane<4, 0>(unit + t * 16, levels, mine);
      if constexpr (BITS < 4) write_plane<2, 0>(unit + t * 8, levels, mine);
      if constexpr (BITS == 6) write_plane<2, 4>(unit + 2048 + t * 8, levels, mine);
      if constexpr (BITS == 5) write_plane<1, 4>(unit + 2048 + t * 4, levels, mine);
      if constexpr (BITS == 3) write_plane<1, 2>(unit + 1024 + t * 4, levels, mine);
    }
  }
  for (u64 i = me; i < static_cast<u64>(tiles) * chunks * F::RUNS * TILE; i += step) {
    const int r = i % TILE, run = i / TILE % F::RUNS;
    const long long chunk = i / TILE / F::RUNS % chunks, tile = tile0 + i / TILE / F::RUNS / chunks;
    const long long from = rows.source(tile * TILE + r);
    if (from < 0) continue;
    u32* const to = reinterpret_cast<u32*>(packed + (tile * chunks + chunk) * F::CHUNK) + run * TILE + r;
    *to = from < rows.rows ? source.word(from, static_cast<int>(chunk) * CHUNK_K + run * RUN) : 0;
  }
}

// As float16; zero has no sign.
__device__ __forceinline__ u32 half_bits(float v) { return __half_as_ushort(__float2half_rn(v + 0.f)); }
// Two numbers as float16, the first in the low half.
__device__ __forceinline__ u32 halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }

}  // namespace rvllm::gemm
