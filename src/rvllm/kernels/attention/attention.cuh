// The arithmetic of attention, shared by the decode and the prefill kernel so that a token's output has the
// same bits in both, whatever the batch or the chunk it is computed in.
//
// Keys are visited in tiles of TILE positions, aligned to position 0. A tile's scores, its own maximum m, sum
// l and weighted values x are computed from nothing but that tile; tiles are merged in ascending order within
// a split of SPLIT positions, and splits in ascending order (the online softmax of Milakov & Gimelshein 2018,
// tiled as by Dao 2023, with a fresh state a tile instead of a running maximum). A position that a row may not
// see contributes an exact zero, so a tile or split that is skipped and one that is wholly masked are the same.
#pragma once

#include "attention/kv_block.cuh"
#include "common/common.cuh"

inline constexpr int TILE = 64;
inline constexpr int SPLIT = 256;
inline constexpr int TILES_PER_SPLIT = SPLIT / TILE;
inline constexpr int PAD = 8;  // elements after each row in shared memory: an odd number of 16-byte chunks a row

// Copies rows [lo, hi) of one head's tile into shared memory and zeros the other rows of the blocks touched.
// ids: the tile's four cache blocks. Row `skip` is left alone (-1: none). Thread `rank` of THREADS.
template <typename T, int D, int THREADS>
__device__ __forceinline__ void load_tile(T* tile, const T* cache, const int4 ids, int head, int kv_heads, int lo,
                                          int hi, int skip, int rank) {
  constexpr int CHUNKS = D / 8, PER_BLOCK = KV_BLOCK * CHUNKS;  // pieces of 16 bytes
  const auto base = [&](int b) {
    const int id = b == 0 ? ids.x : b == 1 ? ids.y : b == 2 ? ids.z : ids.w;
    return cache + ((size_t)id * kv_heads + head) * (KV_BLOCK * D);
  };
  if constexpr (PER_BLOCK % THREADS == 0 && THREADS % CHUNKS == 0) {
    if (lo <= 0 && hi >= TILE && skip < 0) {  // the whole tile: addresses are constants away from two
      const u32 target = smem(tile + rank / CHUNKS * (D + PAD) + rank % CHUNKS * 8);
#pragma unroll
      for (int b = 0; b < TILE / KV_BLOCK; b++) {
        const T* const source = base(b) + rank * 8;
#pragma unroll
        for (int i = 0; i < PER_BLOCK / THREADS; i++)
          cp_async16(target + (b * KV_BLOCK + i * (THREADS / CHUNKS)) * (D + PAD) * 2, source + i * THREADS * 8);
      }
      return;
    }
  }
#pragma unroll 4
  for (int piece = rank; piece < min(4, (hi + KV_BLOCK - 1) / KV_BLOCK) * PER_BLOCK; piece += THREADS) {
    const int row = piece / CHUNKS;
    const bool valid = row >= lo && row < hi;
    const T* const source = valid ? base(piece / PER_BLOCK) + piece % PER_BLOCK * 8 : cache;
    if (row != skip) cp_async16(smem(tile + row * (D + PAD) + piece % CHUNKS * 8), source, valid ? 16 : 0);
  }
}

// s[n] = q k^T for the tile's positions 8n .. 8n + 7; thread layout as mma's accumulator: rows lane / 4 and
// lane / 4 + 8, columns 2 * (lane % 4) + {0, 1}. Only the first `blocks` groups of 16 positions are computed.
template <typename T, int DK, bool FULL>
__device__ __forceinline__ void scores_of(float (&s)[8][4], u32 q, u32 k, int blocks) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.f;
#pragma unroll
  for (int kk = 0; kk < DK / 16; kk++) {
    u32 a[4];
    ldmatrix_x4(a, q + kk * 32);
#pragma unroll
    for (int b = 0; b < 4; b++)
      if (FULL || b < blocks) {
        u32 r[4];
        ldmatrix_x4(r, k + b * 16 * (DK + PAD) * 2 + kk * 32);
        mma_16816(s[2 * b], a, {r[0], r[1]}, T());
        mma_16816(s[2 * b + 1], a, {r[2], r[3]}, T());
      }
  }
}

template <typename T, int DK>
__device__ __forceinline__ void tile_scores(float (&s)[8][4], const T* q, const T* k, int blocks, int lane) {
  const u32 qa = smem(q + (lane % 16) * (DK + PAD) + (lane / 16) * 8);
  const u32 ka = smem(k + (lane % 8 + (lane / 16) * 8) * (DK + PAD) + ((lane / 8) % 2) * 8);
  if (blocks == 4)
    scores_of<T, DK, true>(s, qa, ka, 4);
  else
    scores_of<T, DK, false>(s, qa, ka, blocks);
}

// Hides what the two rows of this thread may not see: position < lo[i] or > hi[i], counted from the tile.
__device__ __forceinline__ void tile_mask(float (&s)[8][4], const int (&lo)[2], const int (&hi)[2], int lane) {
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int position = n * 8 + (lane % 4) * 2 + (i & 1);
      if (position < lo[i / 2] || position > hi[i / 2]) s[n][i] = -INFINITY_F;
    }
}

// logit = cap * tanh(s * scale / cap), through e^2x; before the mask.
__device__ __forceinline__ void tile_soft_cap(float (&s)[8][4], float scale, float cap) {
  const float twice = __fmul_rn(2.f * LOG2E, __fdiv_rn(scale, cap));
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float e = exp2_fast(__fmul_rn(s[n][i], twice));
      s[n][i] = __fmul_rn(cap, __fsub_rn(1.f, __fdiv_rn(2.f, __fadd_rn(e, 1.f))));
    }
}

// Scores to weights relative to the tile's own maximum, in place. c: factor to base-2 logits. Out: m, the maximum in
// base-2 units; l, this thread's share of the sum of weights, see tile_sums. Without `upper` rows 8 to 15 are not
// wanted and get no weight.
__device__ __forceinline__ void tile_weights(float (&s)[8][4], float c, float (&m)[2], float (&l)[2], bool upper = true) {
  const int rows = upper ? 2 : 1;
  float best[2], base[2], high[8][2];
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) high[n][h] = fmaxf(s[n][2 * h], s[n][2 * h + 1]);
#pragma unroll
  for (int w = 4; w; w /= 2)
#pragma unroll
    for (int n = 0; n < w; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) high[n][h] = fmaxf(high[n][h], high[n + w][h]);
#pragma unroll
  for (int h = 0; h < 2; h++) best[h] = high[0][h];
#pragma unroll
  for (int o = 1; o <= 2; o *= 2)
#pragma unroll
    for (int h = 0; h < 2; h++) best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], o));
#pragma unroll
  for (int h = 0; h < 2; h++) {
    m[h] = h < rows ? __fmul_rn(best[h], c) : -INFINITY_F;
    base[h] = m[h] == -INFINITY_F ? 0.f : m[h];
    l[h] = 0.f;
  }
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (h < rows) {
        s[n][2 * h] = exp2_fast(__fmaf_rn(s[n][2 * h], c, -base[h]));
        s[n][2 * h + 1] = exp2_fast(__fmaf_rn(s[n][2 * h + 1], c, -base[h]));
        const float pair = __fadd_rn(s[n][2 * h], s[n][2 * h + 1]);
        l[h] = n == 0 ? pair : __fadd_rn(l[h], pair);
      } else {
        s[n][2 * h] = s[n][2 * h + 1] = 0.f;
      }
    }
}

// Sums of weights over the four threads of a row.
__device__ __forceinline__ void tile_sums(float (&l)[2]) {
#pragma unroll
  for (int o = 1; o <= 2; o *= 2)
#pragma unroll
    for (int h = 0; h < 2; h++) l[h] = __fadd_rn(l[h], __shfl_xor_sync(~0u, l[h], o));
}

// Weights as mma's A fragments, four steps of 16 positions.
template <typename T>
__device__ __forceinline__ void pack_weights(const float (&s)[8][4], u32 (&p)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    p[j][0] = pack2<T>(s[2 * j][0], s[2 * j][1]);
    p[j][1] = pack2<T>(s[2 * j][2], s[2 * j][3]);
    p[j][2] = pack2<T>(s[2 * j + 1][0], s[2 * j + 1][1]);
    p[j][3] = pack2<T>(s[2 * j + 1][2], s[2 * j + 1][3]);
  }
}

template <typename T>
__device__ __forceinline__ void tile_softmax(float (&s)[8][4], u32 (&p)[4][4], float c, float (&m)[2], float (&l)[2],
                                             bool upper = true) {
  tile_weights(s, c, m, l, upper);
  tile_sums(l);
  pack_weights<T>(s, p);
}

// x = p v, sixteen columns at a time: take(g, x) gets columns 16 g + 8 i in x[i], laid out like scores.
template <typename T, int DV, bool FULL, typename Take>
__device__ __forceinline__ void values_of(const u32 (&p)[4][4], u32 v, int blocks, Take take) {
#pragma unroll
  for (int g = 0; g < DV / 16; g++) {
    float x[2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (FULL || j < blocks) {
        u32 r[4];
        ldmatrix_x4_trans(r, v + j * 16 * (DV + PAD) * 2 + g * 32);
        mma_16816(x[0], p[j], {r[0], r[1]}, T());
        mma_16816(x[1], p[j], {r[2], r[3]}, T());
      }
    take(g, x);
  }
}

template <typename T, int DV, typename Take>
__device__ __forceinline__ void tile_values(const u32 (&p)[4][4], const T* v, int blocks, int lane, Take take) {
  const u32 va = smem(v + (lane % 16) * (DV + PAD) + (lane / 16) * 8);
  if (blocks == 4)
    values_of<T, DV, true>(p, va, 4, take);
  else
    values_of<T, DV, false>(p, va, blocks, take);
}

// Merging a state (m, l, x) into (M, L, X): X = X * keep + x * add, likewise L. m is a maximum in base-2 units, or
// another state's reference; M is a reference that sums are relative to. It is raised only where m exceeds it by more
// than SLACK: elsewhere keep is exactly 1, and a kernel whose rows all have that may leave the multiplication out.
inline constexpr float SLACK = 16.f;

struct Factors {
  float keep, add;
};

__device__ __forceinline__ Factors merge_maximum(float& M, float m) {
  const bool raised = m > __fadd_rn(M, SLACK);
  const float old = M;
  M = raised ? m : M;
  const float base = M == -INFINITY_F ? 0.f : M;
  return {raised && old != -INFINITY_F ? exp2_fast(__fsub_rn(old, base)) : 1.f, exp2_fast(__fsub_rn(m, base))};
}

__device__ __forceinline__ float merge(float X, float x, Factors f) { return __fmaf_rn(x, f.add, __fmul_rn(X, f.keep)); }

// The attention output is weighted values times this: one over the sum of weights.
__device__ __forceinline__ float finish(float L) { return __frcp_rn(L); }
