// What the consumers of prefill attention for Hopper do: queries, products by wgmma, weights, folding. See prefill_sm90.cu.
#pragma once

#include "attention/prefill_sm90.cuh"
#include "ptx/wgmma.cuh"

// A consumer warp's 16 rows of queries into its part of shared memory: 16-byte chunk c of row r at c ^ (r % 8).
template <typename T, int D>
__device__ __forceinline__ void fetch_queries(u32 to, const T* q, const Work& w, int warp_row, int q_pitch, int group,
                                              int lane) {
  constexpr int CHUNKS = D / 8;
#pragma unroll 1
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int r = i / CHUNKS, chunk = i % CHUNKS, row = warp_row + r;
    const bool valid = row <= w.last_row;
    const T* const source = q + (size_t)(w.offset + row / group) * q_pitch + (size_t)(w.head * group + row % group) * D;
    cp_async16(to + r * (Layout<D>::HALVES * 128) + (chunk ^ r % 8) * 16, valid ? source + chunk * 8 : q, valid ? 16 : 0);
  }
  cp_async_commit();
}

// What a consumer thread keeps of its two rows: of the splits so far (their values are in shared memory), and of the
// tiles of this split.
template <int D>
struct State {
  float M[2], L[2], m[2], l[2], x[D / 2];
  bool some;  // whether a split has been finished

  __device__ __forceinline__ void clear() {
    some = false;
#pragma unroll
    for (int h = 0; h < 2; h++) M[h] = -INFINITY_F, L[h] = 0.f;
    clear_split();
  }
  __device__ __forceinline__ void clear_split() {
#pragma unroll
    for (int h = 0; h < 2; h++) m[h] = -INFINITY_F, l[h] = 0.f;
#pragma unroll
    for (int i = 0; i < D / 2; i++) x[i] = 0.f;
  }
  // A tile into the split: first its maximum and sum of weights, then its values.
  struct Both {
    Factors of[2];
    bool kept;  // no row of the warp is to be multiplied by anything but 1
  };
  static __device__ __forceinline__ Both factors(float (&M)[2], float (&L)[2], const float (&m)[2], const float (&l)[2]) {
    Both f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      f.of[h] = merge_maximum(M[h], m[h]);
      L[h] = merge(L[h], l[h], f.of[h]);
    }
    f.kept = __all_sync(~0u, f.of[0].keep == 1.f && f.of[1].keep == 1.f);
    return f;
  }
  __device__ __forceinline__ Both weigh(const float (&tile_m)[2], const float (&tile_l)[2]) {
    return factors(m, l, tile_m, tile_l);
  }
  __device__ __forceinline__ void fold(const Both& f, const float (&values)[D / 2]) {
    if (f.kept) {
#pragma unroll
      for (int i = 0; i < D / 2; i++) x[i] = __fmaf_rn(values[i], f.of[i / 2 % 2].add, x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < D / 2; i++) x[i] = merge(x[i], values[i], f.of[i / 2 % 2]);
    }
  }
  // The split into the totals. total: this thread's part of them, two columns of both rows every 128 floats.
  __device__ __forceinline__ void end_split(float* total) {
    const Both f = factors(M, L, m, l);
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float4* const cell = reinterpret_cast<float4*>(total + i * 128);
      *cell = with_total(some ? *cell : make_float4(0.f, 0.f, 0.f, 0.f), i, f);
    }
    some = true;
    clear_split();
  }
  // The values of all splits, x among them, over their sum of weights.
  template <bool SPLITS>
  __device__ __forceinline__ void finish_all(const float* total, float (&result)[D / 2]) {
    if constexpr (!SPLITS) {
      const float over[2] = {finish(l[0]), finish(l[1])};
#pragma unroll
      for (int i = 0; i < D / 2; i++) result[i] = __fmul_rn(x[i], over[i / 2 % 2]);
      return;
    }
    const Both f = factors(M, L, m, l);
    const float over[2] = {finish(L[0]), finish(L[1])};
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      const float4 old = some ? *reinterpret_cast<const float4*>(total + i * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
      const float4 v = with_total(old, i, f);
      result[4 * i] = __fmul_rn(v.x, over[0]), result[4 * i + 1] = __fmul_rn(v.y, over[0]);
      result[4 * i + 2] = __fmul_rn(v.z, over[1]), result[4 * i + 3] = __fmul_rn(v.w, over[1]);
    }
  }
  __device__ __forceinline__ float4 with_total(const float4& old, int i, const Both& f) const {
    return make_float4(merge(old.x, x[4 * i], f.of[0]), merge(old.y, x[4 * i + 1], f.of[0]),
                       merge(old.z, x[4 * i + 2], f.of[1]), merge(old.w, x[4 * i + 3], f.of[1]));
  }
};

// Scheduler: of the paged cache, or of texts (encoder/text_attention_sm90.cu), whose rows see all of their text.
template <typename T, int D, bool FP8, typename Scheduler>
__device__ __forceinline__ void consume(Ring<D, FP8> ring, Scheduler scheduler, u32 q_place, float* totals,
                                        T* __restrict__ out, const T* q, int q_pitch, int out_pitch, float scale,
                                        int warp, int lane) {
  using L = Layout<D, FP8>;
  const int group = scheduler.group, window = scheduler.window;
  const float factor = __fmul_rn(scale, LOG2E);
  float* const total = totals + lane * 4;
  const auto release = [&](u32 bar) {
    if (lane == 0) mbar_arrive(bar);
  };
  const auto fetch = [&](int round) {
    Work w;
    if (scheduler.get(round, w)) fetch_queries<T, D>(q_place, q, w, w.first_row + warp * 16, q_pitch, group, lane);
  };
  fetch(0);
  if (warp >= 4) bar_arrive(1, CONSUMERS);  // the first turn is the other warpgroup's
  Work w;
  for (int round = 0; scheduler.get(round, w); round++) {
    const int warp_row = w.first_row + warp * 16, group_row = w.first_row + warp / 4 * GROUP_ROWS;
    u32 queries[D / 16][4];
    cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      ldmatrix_x4(queries[k], q_place + lane % 16 * (L::HALVES * 128) + (((2 * k + lane / 16) ^ lane % 8) * 16));
    __syncwarp();
    fetch(round + 1);

    // What the warpgroup's, the warp's and this thread's rows may see.
    const bool idle = group_row > w.last_row;
    const auto position_of = [&](int row) { return Scheduler::CAUSAL ? w.start + row / group : w.kv_len - 1; };
    const int group_lo = position_of(group_row), group_hi = position_of(min(group_row + GROUP_ROWS - 1, w.last_row));
    const int begin = idle ? w.last_tile + 1 : window > 0 ? max(0, group_lo - window + 1) / TILE : 0;
    const int end = group_hi / TILE;
    const int warp_lo = position_of(min(warp_row, w.last_row)), warp_hi = position_of(min(warp_row + 15, w.last_row));
    int position[2], query_head[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = min(warp_row + lane / 4 + 8 * h, w.last_row);
      position[h] = position_of(row);
      query_head[h] = w.head * group + row % group;
    }

    float s[8][4], values[D / 2], m[2], l[2];
    u32 p[4][4];
    float(&scores)[32] = reinterpret_cast<float(&)[32]>(s);
    // The warpgroups hand products to the tensor cores in turns, so that one multiplies while the other weighs.
    const auto my_turn = [&] { bar_sync(1 + warp / 4, CONSUMERS); };
    const auto your_turn = [&] { bar_arrive(2 - warp / 4, CONSUMERS); };
    const auto multiply_keys = [&](const Ring<D, FP8>& r) {
      const u64 keys = wgmma_operand(r.keys());
      mbar_wait(r.full_keys(), r.phase);
      my_turn();
      wgmma_pin(scores);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D / 16; k++)
        wgmma_rs<TILE, T, 0>(scores, queries[k], wgmma_further(keys, k / 4 * L::HALF + k % 4 * 32), k > 0);
      wgmma_commit();
    };
    const auto multiply_values = [&](const Ring<D, FP8>& r) {
      const u64 operand = wgmma_operand_mn(r.values(), L::HALF);
      mbar_wait(r.full_values(), r.phase);
      wgmma_pin(values);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < TILE / 16; k++)
        wgmma_rs<D, T, 1>(values, p[k], wgmma_further(operand, k * 2048), k > 0);
      wgmma_commit();
    };
    const auto weigh = [&](int t) {
      const int tile_start = t * TILE;
      if (tile_start + TILE - 1 > warp_lo || (window > 0 && tile_start < warp_hi - window + 1)) {
        int lo[2], hi[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          lo[h] = window > 0 ? position[h] - window + 1 - tile_start : 0;
          hi[h] = position[h] - tile_start;
        }
        tile_mask(s, lo, hi, lane);
      }
      if constexpr (!Scheduler::ALL) scheduler.mask.hide(s, tile_start, position, query_head, lane);
      tile_weights(s, factor, m, l);
    };

    int t = w.first_tile;
    const auto skip = [&](int until) {  // tiles of the other warpgroup alone
      for (; t < until && t <= w.last_tile; t = scheduler.seen_from(t + 1, w)) {
        my_turn();
        your_turn();
        mbar_wait(ring.full_keys(), ring.phase);
        release(ring.free_keys());
        mbar_wait(ring.full_values(), ring.phase);
        release(ring.free_values());
        ring.advance();
      }
    };
    State<D> state;
    state.clear();
    skip(begin);
    if (t <= end && !idle) {
      multiply_keys(ring);
      your_turn();
      wgmma_wait<0>();
      wgmma_pin(scores);
      release(ring.free_keys());
      weigh(t);
      pack_weights<T>(s, p);
      tile_sums(l);
      auto f = state.weigh(m, l);
      for (int next; (next = scheduler.seen_from(t + 1, w)) <= end; t = next) {
        Ring<D, FP8> ahead = ring;
        ahead.advance();
        multiply_keys(ahead);
        multiply_values(ring);
        your_turn();
        wgmma_wait<1>();
        wgmma_pin(scores);
        release(ahead.free_keys());
        weigh(next);
        // Never, but the compiler does not know: weights come before the wait for the values.
        if (l[0] + l[1] == -1.f) asm volatile("nanosleep.u32 0;" ::: "memory");
        wgmma_wait<0>();
        wgmma_pin(values);
        release(ring.free_values());
        state.fold(f, values);
        if (Scheduler::SPLITS && next / TILES_PER_SPLIT != t / TILES_PER_SPLIT) state.end_split(total);
        tile_sums(l);
        f = state.weigh(m, l);
        pack_weights<T>(s, p);
        ring = ahead;
      }
      multiply_values(ring);
      wgmma_wait<0>();
      wgmma_pin(values);
      release(ring.free_values());
      state.fold(f, values);
      ring.advance();
      t = scheduler.seen_from(t + 1, w);
    }
    skip(w.last_tile + 1);
    if (idle) continue;

    // Through shared memory, so that whole rows leave at once.
    const u32 staged = smem(totals);
    float result[D / 2];
    state.template finish_all<Scheduler::SPLITS>(total, result);
    __syncwarp();  // the totals have been read
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
      const int r = lane / 4 + i % 2 * 8;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(staged + r * (L::HALVES * 128) + (i / 2 ^ r % 8) * 16 + lane % 4 * 4), "r"(pack2<T>(result[2 * i], result[2 * i + 1]))
                   : "memory");
    }
    __syncwarp();
    for (int i = lane; i < 16 * (D / 8); i += 32) {
      const int r = i / (D / 8), chunk = i % (D / 8), row = warp_row + r;
      if (row > w.last_row) continue;
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(staged + r * (L::HALVES * 128) + (chunk ^ r % 8) * 16)
                   : "memory");
      T* const target = out + (size_t)(w.offset + row / group) * out_pitch + (size_t)(w.head * group + row % group) * D;
      *reinterpret_cast<uint4*>(target + chunk * 8) = v;
    }
    __syncwarp();  // what was staged has been read
  }
}
