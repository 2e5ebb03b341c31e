// The arithmetic of latent attention, shared by the decode and the prefill kernel so that a token's output has
// the same bits in both, whatever the batch or the chunk it is computed in.
//
// All query heads of a token share one key a position, [latent; rotated key], and the values are its first `rank`
// elements; a row is one head of one token. Sixteen rows are the M side of the tensor-core tile, and a group of
// WARPS warps works on them: on a tile of 64 positions (aligned to position 0) each warp scores its share of the
// positions, maxima and weights are exchanged in shared memory, and each warp sums its share of the value columns.
// What a tile gives depends on that tile alone: scores are two sums, of the even and of the odd steps of 16
// elements; weights are relative to the tile's maximum; their sum is that of eight groups of eight positions, in
// ascending order. Tiles are merged in ascending order within a split, splits in ascending order, by `merge` of
// attention/attention.cuh. How many warps share the work does not enter. Splits begin at fixed positions: every 64 up to 2048,
// where latency counts, every 256 from there on.
#pragma once

#include "attention/attention.cuh"

inline constexpr int EIGHTS = TILE / 8;      // groups of eight positions in a tile
inline constexpr int WEIGHTS_PITCH = TILE + PAD;
inline constexpr int SHORT_SPLITS = 32, SHORT = 1, LONG = 4;  // splits of SHORT tiles, then those of LONG

__device__ __forceinline__ int split_of(int tile) {
  constexpr int LIMIT = SHORT_SPLITS * SHORT;
  return tile < LIMIT ? tile / SHORT : SHORT_SPLITS + (tile - LIMIT) / LONG;
}
__device__ __forceinline__ int first_tile(int split) {
  return split < SHORT_SPLITS ? split * SHORT : SHORT_SPLITS * SHORT + (split - SHORT_SPLITS) * LONG;
}

// Sums over positions of the two rows of a thread: unit u is columns 16 (u * WARPS + warp) and on, laid out like
// mma's accumulators.
template <int UNITS>
struct Latents {
  float M[2], L[2], x[UNITS][2][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      M[h] = -INFINITY_F;
      L[h] = 0.f;
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int i = 0; i < 8; i++) x[u][i / 4][i % 4] = 0.f;
  }
  __device__ __forceinline__ void add(const Latents& later) {
    Factors f[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      f[h] = merge_maximum(M[h], later.M[h]);
      L[h] = merge(L[h], later.L[h], f[h]);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++)
#pragma unroll
      for (int i = 0; i < 8; i++) x[u][i / 4][i % 4] = merge(x[u][i / 4][i % 4], later.x[u][i / 4][i % 4], f[i % 4 / 2]);
  }
};

// What a group of warps exchanges about a tile.
template <typename T>
struct Exchange {
  T weights[16 * WEIGHTS_PITCH];
  float maxima[EIGHTS * 16], sums[EIGHTS * 16];
};

// Copies rows [0, hi) of a tile to shared memory and zeros the others. ids: its four cache blocks; cache [blocks, 16, width]. Row `skip` is left alone (-1: none). All threads of the block take part.
template <typename T>
__device__ __forceinline__ void load_latents(T* tile, const T* cache, const int4 ids, int width, int hi, int skip) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < TILE; row += blockDim.x / 32) {
    if (row == skip) continue;
    const int b = row / KV_BLOCK, id = b == 0 ? ids.x : b == 1 ? ids.y : b == 2 ? ids.z : ids.w;
    const bool valid = row < hi;
    const T* const source = valid ? cache + ((size_t)id * KV_BLOCK + row % KV_BLOCK) * width : cache;
    const u32 target = smem(tile + row * (width + PAD));
    for (int c = lane; c < width / 8; c += 32) cp_async16(target + c * 16, valid ? source + c * 8 : cache, valid ? 16 : 0);
  }
}

// Copies rows first, first + 1, ... of queries [count, width] to shared memory; zeros where there are none.
template <typename T>
__device__ __forceinline__ void load_queries(T* tile, const T* q, size_t first, int rows, int room, int width) {
  for (int row = threadIdx.x / 32; row < room; row += blockDim.x / 32) {
    const bool valid = row < rows;
    const u32 target = smem(tile + row * (width + PAD));
    for (int c = threadIdx.x % 32; c < width / 8; c += 32)
      cp_async16(target + c * 16, valid ? q + (first + row) * width + c * 8 : q, valid ? 16 : 0);
  }
}

// Scores of the warp's positions, raw; s[n] are positions 8 (warp * OWN + n) and on, laid out like mma's accumulators.
template <typename T, int OWN>
__device__ __forceinline__ void latent_scores(float (&s)[OWN][4], const T* q, const T* keys, int width, int warp, int lane) {
  const int pitch = width + PAD, steps = width / 16;
  const u32 qa = smem(q + (lane % 16) * pitch + (lane / 16) * 8);
  const u32 ka = smem(keys + (warp * OWN * 8 + lane % 8 + (OWN == 2 ? lane / 16 * 8 : 0)) * pitch + (lane / 8) % 2 * 8);
  float sum[2][OWN][4] = {};
  const auto step = [&](int k, float (&into)[OWN][4]) {
    u32 a[4];
    ldmatrix_x4(a, qa + k * 32);
    if constexpr (OWN == 2) {
      u32 b[4];
      ldmatrix_x4(b, ka + k * 32);
      mma_16816(into[0], a, {b[0], b[1]}, T());
      mma_16816(into[1], a, {b[2], b[3]}, T());
    } else {
      u32 b[2];
      ldmatrix_x2(b, ka + k * 32);
      mma_16816(into[0], a, b, T());
    }
  };
  int k = 0;
#pragma unroll(OWN == 1 ? 3 : 2)
  for (; k + 1 < steps; k += 2) {
    step(k, sum[0]);
    step(k + 1, sum[1]);
  }
  if (k < steps) step(k, sum[0]);
#pragma unroll
  for (int n = 0; n < OWN; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = __fadd_rn(sum[0][n][i], sum[1][n][i]);
}

// Adds weighted values to `state`, of the warp's columns below `columns`, all of them if FULL. v: where they begin, for
// ldmatrix; step: bytes from 16 positions to the next.
template <typename T, int WARPS, int UNITS, bool FULL>
__device__ __forceinline__ void add_values(Latents<UNITS>& state, const u32 (&p)[4][4], u32 v, u32 step, int columns,
                                              const Factors (&f)[2]) {
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    if (!FULL && u * WARPS * 16 >= columns) continue;
    float x[2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 r[4];
      ldmatrix_x4_trans(r, v + j * step + u * WARPS * 32);
      mma_16816(x[0], p[j], {r[0], r[1]}, T());
      mma_16816(x[1], p[j], {r[2], r[3]}, T());
    }
#pragma unroll
    for (int i = 0; i < 8; i++) state.x[u][i / 4][i % 4] = merge(state.x[u][i / 4][i % 4], x[i / 4][i % 4], f[i % 4 / 2]);
  }
}

// Merges one tile into `state`. q: the group's 16 rows; keys: the tile; hi: the last position of the tile that each of
// the thread's two rows sees (negative: none). factor: to base-2 logits. warp: within the group. Every thread of the
// block calls it.
template <typename T, int WARPS, int UNITS>
__device__ __forceinline__ void latent_tile(Latents<UNITS>& state, const T* q, const T* keys, Exchange<T>& exchange,
                                            int width, int rank, const int (&hi)[2], float factor, int warp, int lane) {
  constexpr int OWN = EIGHTS / WARPS;
  const int pitch = width + PAD, row = lane / 4;
  float s[OWN][4];
  latent_scores<T, OWN>(s, q, keys, width, warp, lane);
#pragma unroll
  for (int n = 0; n < OWN; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int position = (warp * OWN + n) * 8 + lane % 4 * 2 + (i & 1);
      if (position > hi[i / 2]) s[n][i] = -INFINITY_F;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float best = fmaxf(s[n][2 * h], s[n][2 * h + 1]);
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      if (lane % 4 == 0) exchange.maxima[(warp * OWN + n) * 16 + row + 8 * h] = best;
    }
  }
  __syncthreads();  // all maxima are there

  float m[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float best = exchange.maxima[row + 8 * h];
#pragma unroll
    for (int e = 1; e < EIGHTS; e++) best = fmaxf(best, exchange.maxima[e * 16 + row + 8 * h]);
    m[h] = __fmul_rn(best, factor);
    const float base = m[h] == -INFINITY_F ? 0.f : m[h];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const float a = exp2_fast(__fmaf_rn(s[n][2 * h], factor, -base));
      const float b = exp2_fast(__fmaf_rn(s[n][2 * h + 1], factor, -base));
      float sum = __fadd_rn(a, b);
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
      const int eight = warp * OWN + n;
      if (lane % 4 == 0) exchange.sums[eight * 16 + row + 8 * h] = sum;
      T* const cell = exchange.weights + (row + 8 * h) * WEIGHTS_PITCH + eight * 8 + lane % 4 * 2;
      *reinterpret_cast<u32*>(cell) = pack2<T>(a, b);
    }
  }
  __syncthreads();  // all weights and their sums are there

  Factors f[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float l = exchange.sums[row + 8 * h];
#pragma unroll
    for (int e = 1; e < EIGHTS; e++) l = __fadd_rn(l, exchange.sums[e * 16 + row + 8 * h]);
    f[h] = merge_maximum(state.M[h], m[h]);
    state.L[h] = merge(state.L[h], l, f[h]);
  }
  u32 p[4][4];
  const u32 pa = smem(exchange.weights + (lane % 16) * WEIGHTS_PITCH + (lane / 16) * 8);
#pragma unroll
  for (int j = 0; j < 4; j++) ldmatrix_x4(p[j], pa + j * 32);
  const u32 va = smem(keys + (lane % 16) * pitch + (lane / 16) * 8) + warp * 32;
  if (UNITS == 4 && rank == UNITS * WARPS * 16)  // more units at once have no registers
    add_values<T, WARPS, UNITS, true>(state, p, va, pitch * 32, rank - warp * 16, f);
  else
    add_values<T, WARPS, UNITS, false>(state, p, va, pitch * 32, rank - warp * 16, f);
}

// Writes finished rows to out [count, rank]: rows first, first + 1, ... of the 16, as many as `rows`.
template <typename T, int WARPS, int UNITS>
__device__ __forceinline__ void store_latents(T* out, const Latents<UNITS>& state, size_t first, int rows, int rank, int warp,
                                              int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
    if (row >= rows) continue;
    const float over = finish(state.L[h]);
    T* const target = out + (first + row) * rank + lane % 4 * 2;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int column = (u * WARPS + warp) * 16;
      if (column >= rank) continue;
#pragma unroll
      for (int n = 0; n < 2; n++)
        *reinterpret_cast<u32*>(target + column + n * 8) =
            pack2<T>(__fmul_rn(state.x[u][n][2 * h], over), __fmul_rn(state.x[u][n][2 * h + 1], over));
    }
  }
}

// ---- results of splits that different blocks have computed ---------------------------------------------
// Decode cuts its work into items: (sequence, 16 of its heads, split), numbered in this order. Block b of G takes
// items [begin(b), begin(b + 1)). A block that has a sequence's splits from the first one on merges them as it
// goes; if it has all of them, it writes the result. Otherwise it leaves that sum in its slot `spare`, and for
// each split of a sequence that another block began its sum in slot item - begin. Slots are [16, rank] float32
// values and [16] pairs of maximum and sum of weights; a block has spare + 1 of them.
struct Gathering {
  int first, splits, items, unused;  // the group's first item, how many it has, all items; splits 0: out is written
};

// The product of items and blocks is below 2^32.
__device__ __forceinline__ int first_item(u32 items, u32 block, u32 blocks) { return items * block / blocks; }
// The block that has an item: the last one that begins at it or before.
__device__ __forceinline__ int block_of(u32 item, u32 items, u32 blocks) { return ((item + 1) * blocks - 1) / items; }
__device__ __forceinline__ size_t slot_size(int rank) { return 16 * (size_t)(rank + 2); }

// Writes unfinished rows to a slot.
template <int WARPS, int UNITS>
__device__ __forceinline__ void leave_latents(float* slot, const Latents<UNITS>& state, int rank, int warp, int lane) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int column = (u * WARPS + warp) * 16 + lane % 4 * 2;
      if (column - lane % 4 * 2 >= rank) continue;
#pragma unroll
      for (int n = 0; n < 2; n++)
        *reinterpret_cast<float2*>(slot + row * rank + column + n * 8) =
            make_float2(state.x[u][n][2 * h], state.x[u][n][2 * h + 1]);
    }
    if (warp == 0 && lane % 4 == 0)
      *reinterpret_cast<float2*>(slot + 16 * rank + 2 * row) = make_float2(state.M[h], state.L[h]);
  }
}
