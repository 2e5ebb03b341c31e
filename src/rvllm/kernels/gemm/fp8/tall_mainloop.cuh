// What kernels share whose tokens are the 64-row side of wgmma: their shared memory, how the ring is filled, and how a consumer
// warpgroup sums its 64 tokens over a segment of K.
#pragma once

#include "gemm/fill_ring.cuh"
#include "gemm/fp8/fp8.cuh"
#include "gemm/tile_scheduler.cuh"
#include "ptx/wgmma_fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;

// Of a warpgroup: one as wide as the rows; or two, while one of which is scaled and added, the tensor cores sum the other:
// halves of the rows, or blocks of K in turns.
enum Accumulators { WHOLE, HALVES, TURNS };

// SUMS: whether sums of the segments before are kept. SHARERS_: blocks that a load of weights is for.
// PREFETCHES_: whether a segment begins by asking for the rows' scales.
template <int ROWS_, bool SUMS, int SHARERS_, Accumulators HOW_, bool PREFETCHES_>
struct TallLayout {
  static constexpr Accumulators HOW = HOW_;
  static constexpr bool PREFETCHES = PREFETCHES_;
  static constexpr int ROWS = ROWS_, SHARERS = SHARERS_, WIDTH = HOW == HALVES ? ROWS / 2 : ROWS;  // of an accumulator
  static constexpr int TOKENS = 128, CONSUMERS = 256, THREADS = CONSUMERS + 128, ROW_TILES = ROWS / TILE;
  static constexpr int WEIGHTS = ROW_TILES * TILE_BYTES, X = TOKENS * BLOCK_K;
  static constexpr int WEIGHT_SCALES = ROW_TILES * 32, SCALES = WEIGHT_SCALES + TOKENS * 4, STAGE = WEIGHTS + X + SCALES;
  static constexpr int STAGED = 16 * ROWS * 2;                // a warp's outputs on their way out
  static constexpr int TOTALS = SUMS ? ROWS / 2 * 32 * 4 : 0;  // a warp's sums of the segments before
  static constexpr int ROOM = TOTALS > STAGED ? TOTALS : STAGED;
  static constexpr int BARRIERS = 128, LIMIT = 232448;
  static constexpr int STAGES = (LIMIT - BARRIERS - CONSUMERS / 32 * ROOM) / STAGE;
  // Where they begin.
  static constexpr int X_AT = STAGES * WEIGHTS, ROOM_AT = X_AT + STAGES * X, SCALES_AT = ROOM_AT + CONSUMERS / 32 * ROOM;
  static constexpr int BARRIERS_AT = SCALES_AT + STAGES * SCALES;
  static_assert(STAGES >= 3 && STAGES * 16 <= BARRIERS && SCALES % 16 == 0);
};

// The ring in shared memory from `base` on.
template <class L>
__device__ __forceinline__ Ring tall_ring(u32 base) {
  return {L::STAGES, base, base + L::X_AT, L::WEIGHTS, L::X, base + L::BARRIERS_AT};
}

// One thread: fills the ring with blocks [first, last) of K. Weights first, which depend on no kernel before this one.
template <class L, class Scheduler>
__device__ __forceinline__ void produce(const TensorMap& x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
                                        const float* x_scales, int x_pitch, Scheduler scheduler, Ring ring, u32 scales, int rows,
                                        int blocks, int first, int last) {
  using namespace ptx;
  constexpr u16 BOTH = 3;
  const int rank = blockIdx.x % 2, tiles = (rows + TILE - 1) / TILE;
  const u64 hint = scheduler.pairs > 1 ? EVICT_NORMAL : EVICT_FIRST;
  const auto load_weights = [&](const WorkTile& t, int k, const Ring& at) {
    const auto source = [&](int i) { return weights + (static_cast<u64>(min(t.row_tile + i, tiles - 1)) * blocks + k) * TILE_BYTES; };
    const u32 bar = at.full(at.stage), dst = at.weights_at();
    const int scaled = block_scales ? min(L::ROW_TILES, tiles - t.row_tile) * 32 : 0;
    mbar_arrive_expect(bar, L::WEIGHTS + L::X + L::TOKENS * 4 + scaled);
    if constexpr (L::SHARERS == 1) {
#pragma unroll
      for (int i = 0; i < L::ROW_TILES; i++) bulk_load(dst + i * TILE_BYTES, source(i), TILE_BYTES, bar, EVICT_NORMAL);
    } else {
      bulk_load_multicast(dst + rank * TILE_BYTES, source(rank), TILE_BYTES, bar, BOTH, hint);
      if constexpr (L::ROW_TILES == 3) {
        const int half = rank * (TILE_BYTES / 2);
        bulk_load_multicast(dst + 2 * TILE_BYTES + half, source(2) + half, TILE_BYTES / 2, bar, BOTH, hint);
      }
    }
    if (scaled)
      bulk_load(scales + at.stage * L::SCALES, block_scales + (static_cast<u64>(k) * tiles + t.row_tile) * 8, scaled, bar, EVICT_NORMAL);
  };
  const auto load_x = [&](const WorkTile& t, int k, const Ring& at) {
    const u32 bar = at.full(at.stage);
    tensor_load_2d(at.x_at(), &x, k * (BLOCK_K / 2), t.token0, bar);  // the map's elements are pairs of bytes
    bulk_load(scales + at.stage * L::SCALES + L::WEIGHT_SCALES, x_scales + static_cast<size_t>(k) * x_pitch + t.token0,
              L::TOKENS * 4, bar, EVICT_NORMAL);
  };
  WorkTile t;
  bool more = scheduler.next(t);
  int ahead = more ? min(ring.stages, last - first) : 0;
  for (Ring r = ring; r.stage < ahead; r.stage++) load_weights(t, first + r.stage, r);
  griddep_wait();
  for (int k = first; k < first + ahead; k++) {
    load_x(t, k, ring);
    ring.advance();
  }
  while (more) {
    for (int k = first + ahead; k < last; k++) {
      mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
      load_weights(t, k, ring);
      load_x(t, k, ring);
      ring.advance();
    }
    ahead = 0;
    more = scheduler.next(t);
  }
}

// A warpgroup's sums of one work tile after another.
template <class L>
struct TallConsumer {
  static constexpr int ROWS = L::ROWS, REGS = L::WIDTH / 2;
  const float *block_scales, *row_scales;
  int tiles, group, warp, lane;
  u32 scales;
  Ring ring;
  float sum[ROWS / 2];

  __device__ __forceinline__ void release_stage(int stage) { release<L::SHARERS>(ring, stage, lane); }

  // Queues the products of one stage with the WIDTH rows from `first` on.
  __device__ __forceinline__ void multiply(float (&acc)[REGS], int stage, int first) {
    const u32 a = ring.x + stage * ring.x_pitch + group * (64 * BLOCK_K), b = ring.weights + stage * ring.weights_pitch + first * BLOCK_K;
    ptx::wgmma_pin(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int j = 0; j < BLOCK_K / 32; j++)
      ptx::wgmma_e4m3<L::WIDTH>(acc, ptx::wgmma_operand(a + 32 * j), ptx::wgmma_operand(b + 32 * j), j > 0);
    ptx::wgmma_commit();
    ptx::wgmma_pin(acc);
  }
  // Waits for the ring's next stage and returns its number.
  __device__ __forceinline__ int take() {
    const int stage = ring.stage;
    ptx::mbar_wait(ring.full(stage), ring.phase);
    ring.advance();
    return stage;
  }
  __device__ __forceinline__ float2 scales_of_tokens(int stage) const {
    const u32 at = scales + stage * L::SCALES + L::WEIGHT_SCALES + (group * 64 + warp % 4 * 16 + lane / 4) * 4;
    float2 v;
    asm volatile("ld.shared.f32 %0, [%2];\n\tld.shared.f32 %1, [%2 + 32];" : "=f"(v.x), "=f"(v.y) : "r"(at));
    return v;
  }
  // Adds what `acc` has come to, for the rows from FIRST on of a stage.
  template <int FIRST>
  __device__ __forceinline__ void promote(float (&acc)[REGS], int stage, float2 x) {
    ptx::wgmma_pin(acc);
    if (block_scales) {
#pragma unroll
      for (int q = 0; q < L::WIDTH / 32; q++) {  // four groups of eight rows
        float w[4];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(w[0]), "=f"(w[1]), "=f"(w[2]), "=f"(w[3])
                     : "r"(scales + stage * L::SCALES + (FIRST / 32 + q) * 16));
#pragma unroll
        for (int i = 0; i < 16; i++) {
          float& s = sum[FIRST / 2 + 16 * q + i];
          s = fmaf(acc[16 * q + i], __fmul_rn(i / 2 % 2 ? x.y : x.x, w[i / 4]), s);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < REGS; i++) sum[FIRST / 2 + i] = fmaf(acc[i], i / 2 % 2 ? x.y : x.x, sum[FIRST / 2 + i]);
    }
  }

  // Sums `count` blocks of K, of the rows from 64-row tile `tile` on.
  __device__ __forceinline__ void segment(int count, int tile) {
    using namespace ptx;
    if (L::PREFETCHES && row_scales && lane < ROWS / 32)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(row_scales + min(tile + lane / 2, tiles - 1) * TILE + lane % 2 * 32));
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sum[i] = 0.f;
    if constexpr (L::HOW == WHOLE) {
      float acc[REGS];
#pragma unroll 1
      for (int k = 0; k < count; k++) {
        const int stage = take();
        multiply(acc, stage, 0);
        const float2 x = scales_of_tokens(stage);
        wgmma_wait<0>();
        promote<0>(acc, stage, x);
        release_stage(stage);
      }
    } else if constexpr (L::HOW == HALVES) {
      float first[REGS], second[REGS];
      int stage = take(), k = 0;
      multiply(first, stage, 0);
#pragma unroll 1
      for (; k + 1 < count; k++) {
        multiply(second, stage, L::WIDTH);
        wgmma_wait<1>();
        promote<0>(first, stage, scales_of_tokens(stage));
        const int before = stage;
        stage = take();
        multiply(first, stage, 0);
        wgmma_wait<1>();
        promote<L::WIDTH % ROWS>(second, before, scales_of_tokens(before));
        release_stage(before);
      }
      if (k < count) {
        multiply(second, stage, L::WIDTH);
        wgmma_wait<1>();
        promote<0>(first, stage, scales_of_tokens(stage));
        wgmma_wait<0>();
        promote<L::WIDTH % ROWS>(second, stage, scales_of_tokens(stage));
      } else {  // never; without it ptxas waits for every product
        wgmma_wait<0>();
        promote<0>(first, stage, scales_of_tokens(stage));
      }
      release_stage(stage);
    } else {
      float first[REGS], second[REGS];
      const auto finish = [&](float(&acc)[REGS], int stage) {
        promote<0>(acc, stage, scales_of_tokens(stage));
        release_stage(stage);
      };
      int at_first = take(), at_second, k = 0;
      multiply(first, at_first, 0);
#pragma unroll 1
      for (; k + 2 < count; k += 2) {
        at_second = take();
        multiply(second, at_second, 0);
        wgmma_wait<1>();
        finish(first, at_first);
        at_first = take();
        multiply(first, at_first, 0);
        wgmma_wait<1>();
        finish(second, at_second);
      }
      if (k + 1 < count) {
        at_second = take();
        multiply(second, at_second, 0);
        wgmma_wait<1>();
        finish(first, at_first);
        wgmma_wait<0>();
        finish(second, at_second);
      } else {
        wgmma_wait<0>();
        finish(first, at_first);
      }
    }
    if (row_scales) {
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) {
        const float* const at = row_scales + min(tile + j / 8, tiles - 1) * TILE + j % 8 * 8 + lane % 4 * 2;
        const float2 by_row = __ldg(reinterpret_cast<const float2*>(at));
#pragma unroll
        for (int i = 0; i < 4; i++) sum[4 * j + i] = __fmul_rn(sum[4 * j + i], i % 2 ? by_row.y : by_row.x);
      }
    }
  }
};

}  // namespace rvllm::fp8
