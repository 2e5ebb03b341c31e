// Attention of sequences that compute several tokens this step (prompts, whole or in chunks), causal, over the
// paged KV cache into which this step's keys and values have already been written.
//
// A block takes 16 * WARPS rows of one (sequence, kv head): row r is query token r / group under query head
// r % group of the kv head's group, so that heads that share keys share their loads. Each warp owns 16 rows and
// walks the key tiles they can see; keys are fetched while values are used and the other way round. Splits are
// merged every 256 positions into totals kept in shared memory, exactly as the decode kernel merges them.
// Bound by the tensor cores (mma.sync) and, at short prompts, by latency.
#include "attention/fp8_cache.cuh"
#include "attention/masks.cuh"

// C: elements of the cache, T or u8 (see fp8_cache.cuh). What is in e4m3 is fetched into room of its own, keys and values in
// turn, and made numbers of T from there.
template <typename T, int DK, int DV, int WARPS, typename C, typename Sight>
__device__ __forceinline__ void attend(T* __restrict__ out, const T* __restrict__ q, const C* k_cache, const C* v_cache,
                                       const int* tables, const int* slots, const int* kv_lens,
                                       const int* query_offsets, const int2* work, int q_pitch, int out_pitch,
                                       int table_stride, int kv_heads, int group, float scale, float soft_cap,
                                       int window, const Sight& sight) {
  griddep_launch();
  constexpr int THREADS = WARPS * 32, ROWS = WARPS * 16, KS = DK + PAD, VS = DV + PAD;
  extern __shared__ __align__(128) unsigned char shared[];
  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const k_tile = q_tile + ROWS * KS;
  T* const v_tile = k_tile + TILE * KS;
  float* const totals = reinterpret_cast<float*>(v_tile + TILE * VS);
  constexpr bool FP8 = sizeof(C) == 1;
  [[maybe_unused]] u8* const pieces = reinterpret_cast<u8*>(totals + ROWS * DV);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  float* const total = totals + warp * (16 * DV) + lane * 2;

  const int2 mine = work[blockIdx.x];
  if (mine.x < 0) {  // a graph is captured for the most blocks its steps can have
    griddep_wait();
    return;
  }
  const int seq = mine.x, first_row = mine.y, offset = query_offsets[seq], tokens = query_offsets[seq + 1] - offset;
  const int start = kv_lens[seq] - tokens, rows = tokens * group;
  const int* const table = tables + (size_t)slots[seq] * table_stride;
  const int last_row = min(first_row + ROWS, rows) - 1;
  const int block_lo = start + first_row / group, block_hi = start + last_row / group;  // positions of the block
  const int visible_lo = window > 0 ? max(0, block_lo - window + 1) : 0;
  const int last_tile = block_hi / TILE;
  const auto seen_from = [&](int t) {  // the first tile from t on that the block sees something of
    if constexpr (!Sight::ALL)
      while (t < last_tile && !sight.sees(t, block_lo, head * group, group)) t++;
    return t;
  };
  const int first_tile = seen_from(visible_lo / TILE);
  const auto load_k = [&](int t) {
    const int4 blocks = *reinterpret_cast<const int4*>(table + t * (TILE / KV_BLOCK));
    const int lo = max(0, visible_lo - t * TILE), hi = min(TILE, block_hi + 1 - t * TILE);
    if constexpr (FP8)
      kv8::load_pieces<DK, THREADS>(pieces, k_cache, blocks, head, kv_heads, kv8::pieces_of(lo, hi), threadIdx.x);
    else
      load_tile<T, DK, THREADS>(k_tile, k_cache, blocks, head, kv_heads, lo, hi, -1, threadIdx.x);
  };
  const auto load_v = [&](int t) {
    const int4 blocks = *reinterpret_cast<const int4*>(table + t * (TILE / KV_BLOCK));
    const int lo = max(0, visible_lo - t * TILE), hi = min(TILE, block_hi + 1 - t * TILE);
    if constexpr (FP8)
      kv8::load_pieces<DV, THREADS>(pieces, v_cache, blocks, head, kv_heads, kv8::pieces_of(lo, hi), threadIdx.x);
    else
      load_tile<T, DV, THREADS>(v_tile, v_cache, blocks, head, kv_heads, lo, hi, -1, threadIdx.x);
  };
  // What has been fetched, as numbers; every thread calls, after a barrier.
  [[maybe_unused]] const auto expand_k = [&](int t) {
    const int hi = min(TILE, block_hi + 1 - t * TILE);
    kv8::expand_keys<T, DK, THREADS>(k_tile, KS, pieces, 0, (hi + KV_BLOCK - 1) / KV_BLOCK, threadIdx.x);
    __syncthreads();
  };
  [[maybe_unused]] const auto expand_v = [&](int t) {
    const int lo = max(0, visible_lo - t * TILE), hi = min(TILE, block_hi + 1 - t * TILE);
    kv8::expand_values<T, DV, THREADS>(v_tile, VS, pieces, 0, (hi + KV_BLOCK - 1) / KV_BLOCK, lo, hi, threadIdx.x);
    __syncthreads();
  };

  griddep_wait();
  for (int i = threadIdx.x; i < ROWS * (DK / 8); i += THREADS) {
    const int r = i / (DK / 8), chunk = i % (DK / 8), row = first_row + r;
    const bool valid = row < rows;
    const T* source = q + (size_t)(offset + row / group) * q_pitch + (size_t)(head * group + row % group) * DK;
    cp_async16(smem(q_tile + r * KS + chunk * 8), valid ? source + chunk * 8 : q, valid ? 16 : 0);
  }
  load_k(first_tile);
  cp_async_commit();

  // What this warp's rows, and this thread's two of them, may see.
  const int warp_row = first_row + warp * 16;
  const bool idle = warp_row > last_row;
  const int warp_lo = start + warp_row / group, warp_hi = start + min(warp_row + 15, last_row) / group;
  int position[2], query_head[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = min(warp_row + lane / 4 + 8 * h, last_row);
    position[h] = start + row / group;
    query_head[h] = head * group + row % group;
  }

  const float factor = soft_cap > 0.f ? LOG2E : __fmul_rn(scale, LOG2E);
  float M[2] = {-INFINITY_F, -INFINITY_F}, L[2] = {0.f, 0.f};    // of the splits so far; values in `total`
  float sm[2] = {-INFINITY_F, -INFINITY_F}, sl[2] = {0.f, 0.f};  // of the tiles of this split
  float x[DV / 8][4] = {};
  cp_async_wait<0>();
  __syncthreads();
  if constexpr (FP8) expand_k(first_tile);
  load_v(first_tile);
  cp_async_commit();
  for (int t = first_tile, next; t <= last_tile; t = next) {
    const int tile_start = t * TILE;
    next = t < last_tile ? seen_from(t + 1) : t + 1;
    const bool seen = !idle && tile_start <= warp_hi && (window <= 0 || tile_start + TILE > warp_lo - window + 1);
    const int blocks = (min(TILE, block_hi + 1 - tile_start) + KV_BLOCK - 1) / KV_BLOCK;
    u32 p[4][4];
    float m[2], l[2];
    if (seen) {
      float s[8][4];
      tile_scores<T, DK>(s, q_tile + warp * 16 * KS, k_tile, blocks, lane);
      if (soft_cap > 0.f) tile_soft_cap(s, scale, soft_cap);
      if (tile_start + TILE - 1 > warp_lo || (window > 0 && tile_start < warp_hi - window + 1)) {
        int lo[2], hi[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          lo[h] = window > 0 ? position[h] - window + 1 - tile_start : 0;
          hi[h] = position[h] - tile_start;
        }
        tile_mask(s, lo, hi, lane);
      }
      if constexpr (!Sight::ALL) sight.hide(s, tile_start, position, query_head, lane);
      tile_softmax<T>(s, p, factor, m, l);
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are here, the keys have been read
    if constexpr (FP8) expand_v(t);
    if (next <= last_tile) load_k(next);
    cp_async_commit();
    if (seen) {
      Factors f[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        f[h] = merge_maximum(sm[h], m[h]);
        sl[h] = merge(sl[h], l[h], f[h]);
      }
      tile_values<T, DV>(p, v_tile, blocks, lane, [&](int g, const float (&r)[2][4]) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) x[2 * g + n][i] = merge(x[2 * g + n][i], r[n][i], f[i / 2]);
      });
    }
    const bool first_split = t / TILES_PER_SPLIT == first_tile / TILES_PER_SPLIT;
    if (next <= last_tile && next / TILES_PER_SPLIT != t / TILES_PER_SPLIT) {  // a split ends: into the totals with it
      Factors f[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        f[h] = merge_maximum(M[h], sm[h]);
        L[h] = merge(L[h], sl[h], f[h]);
        sm[h] = -INFINITY_F;
        sl[h] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < DV / 8; n++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float2* const cell = reinterpret_cast<float2*>(total + (2 * n + h) * 64);
          const float2 old = first_split ? make_float2(0.f, 0.f) : *cell;
          *cell = make_float2(merge(old.x, x[n][2 * h], f[h]), merge(old.y, x[n][2 * h + 1], f[h]));
          x[n][2 * h] = x[n][2 * h + 1] = 0.f;
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the next keys are here, the values have been read
    if constexpr (FP8)
      if (next <= last_tile) expand_k(next);
    if (next <= last_tile) load_v(next);
    cp_async_commit();
  }
  if (idle) return;
  const bool one_split = first_tile / TILES_PER_SPLIT == last_tile / TILES_PER_SPLIT;
  Factors f[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    f[h] = merge_maximum(M[h], sm[h]);
    L[h] = merge(L[h], sl[h], f[h]);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = warp_row + lane / 4 + 8 * h;
    if (row > last_row) continue;
    const float over = finish(L[h]);
    T* const target = out + (size_t)(offset + row / group) * out_pitch + (size_t)(head * group + row % group) * DV;
#pragma unroll
    for (int n = 0; n < DV / 8; n++) {
      float2 old = make_float2(0.f, 0.f);
      if (!one_split) old = *reinterpret_cast<float2*>(total + (2 * n + h) * 64);
      const float a = merge(old.x, x[n][2 * h], f[h]), b = merge(old.y, x[n][2 * h + 1], f[h]);
      *reinterpret_cast<u32*>(target + n * 8 + (lane % 4) * 2) = pack2<T>(__fmul_rn(a, over), __fmul_rn(b, over));
    }
  }
}

// out, q [T, pitch]; caches, tables, window, soft_cap as in attn_decode. slots, kv_lens int32 [seqs],
// query_offsets int32 [seqs + 1]: as in the step's metadata. tiles int32 [n, 2]: (sequence, first row) of each
// block, the longest first. Grid: (n, kv_heads), WARPS * 32 threads.
template <typename T, int DK, int DV, int WARPS>
__global__ void __launch_bounds__(WARPS * 32)
attn_prefill(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables, const int* slots,
             const int* kv_lens, const int* query_offsets, const int2* work, int q_pitch, int out_pitch,
             int table_stride, int kv_heads, int group, float scale, float soft_cap, int window) {
  attend<T, DK, DV, WARPS>(out, q, k_cache, v_cache, tables, slots, kv_lens, query_offsets, work, q_pitch, out_pitch,
                           table_stride, kv_heads, group, scale, soft_cap, window, Everything());
}

// The same over a cache in e4m3: pieces [blocks, kv_heads], see fp8_cache.cuh.
template <typename T, int D, int WARPS>
__global__ void __launch_bounds__(WARPS * 32)
attn_prefill_fp8(T* out, const T* q, const u8* k_cache, const u8* v_cache, const int* tables, const int* slots,
                 const int* kv_lens, const int* query_offsets, const int2* work, int q_pitch, int out_pitch,
                 int table_stride, int kv_heads, int group, float scale, float soft_cap, int window) {
  attend<T, D, D, WARPS>(out, q, k_cache, v_cache, tables, slots, kv_lens, query_offsets, work, q_pitch, out_pitch,
                         table_stride, kv_heads, group, scale, soft_cap, window, Everything());
}

// attn_prefill where queries see some blocks of keys only.
template <typename T, int DK, int DV, int WARPS>
__global__ void __launch_bounds__(WARPS * 32)
attn_prefill_sparse(T* out, const T* q, const T* k_cache, const T* v_cache, const int* tables, const int* slots,
                    const int* kv_lens, const int* query_offsets, const int2* work, int q_pitch, int out_pitch,
                    int table_stride, int kv_heads, int group, float scale, float soft_cap, int window, int size,
                    int local, int stride, int head_step) {
  attend<T, DK, DV, WARPS>(out, q, k_cache, v_cache, tables, slots, kv_lens, query_offsets, work, q_pitch, out_pitch,
                           table_stride, kv_heads, group, scale, soft_cap, window,
                           SomeBlocks{size, local, stride, head_step});
}
