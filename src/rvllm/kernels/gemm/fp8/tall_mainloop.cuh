// What the kernels of gemm_sm90_tall.cu share: the layout of their shared memory, the loads and the sums.
#pragma once

#include "gemm/fill_ring.cuh"
#include "gemm/fp8/fp8.cuh"
#include "gemm/tile_scheduler.cuh"
#include "ptx/wgmma_fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;

// As gemm_sm90_tall.cu has them.
enum Mode { ONE, SUM, PAIR };

template <int ROWS_, Mode MODE>
struct TallLayout {
  static constexpr int ROWS = ROWS_, TOKENS = 128, CONSUMERS = 256, THREADS = CONSUMERS + 128, ROW_TILES = ROWS / TILE;
  static constexpr int WEIGHTS = ROW_TILES * TILE_BYTES, X = TOKENS * BLOCK_K;
  static constexpr int WEIGHT_SCALES = ROWS * 4;  // of rows, where a segment ends; of blocks, a ninth of that
  static constexpr int SCALES = WEIGHT_SCALES + TOKENS * 4, STAGE = WEIGHTS + X + SCALES;
  static constexpr int STAGED = 16 * ROWS * 2;               // a warp's outputs on their way out
  static constexpr bool HELD = MODE == SUM && ROWS <= 128;     // the sums of the segments before are in registers
  static constexpr int TOTALS = MODE == ONE || HELD ? 0 : ROWS / 2 * 32 * 4;  // or a warp's are here
  static constexpr int ROOM = TOTALS > STAGED ? TOTALS : STAGED;
  static constexpr int BARRIERS = 128, LIMIT = 232448;
  static constexpr int STAGES = (LIMIT - BARRIERS - CONSUMERS / 32 * ROOM) / STAGE;
  // Where they begin.
  static constexpr int X_AT = STAGES * WEIGHTS, ROOM_AT = X_AT + STAGES * X, SCALES_AT = ROOM_AT + CONSUMERS / 32 * ROOM;
  static constexpr int BARRIERS_AT = SCALES_AT + STAGES * SCALES;
  static constexpr int SHARERS = MODE == PAIR ? 1 : 2;  // blocks that a load of weights is for
  static_assert(STAGES >= 3 && STAGES * 16 <= BARRIERS && SCALES % 16 == 0);
  static_assert(MODE != PAIR || CONSUMERS / 32 * TOTALS <= ROOM_AT);
};

// The ring in shared memory from `base` on.
template <class L>
__device__ __forceinline__ Ring tall_ring(u32 base) {
  return {L::STAGES, base, base + L::X_AT, L::WEIGHTS, L::X, base + L::BARRIERS_AT};
}

// Whether a block of K is the last of its segment; asked of segment `first` and those behind it, block by block.
struct SegmentEnds {
  int blocks, segments, first, segment = 0, end = 0;
  __device__ bool is_last(int k) {
    if (k == segment_begin(blocks, segments, first)) segment = first, end = k;
    while (end <= k) end = segment_begin(blocks, segments, ++segment);  // some may be empty
    return k + 1 == end;
  }
};

// What a product is made of, for those who load it. One of the two scales of weights is null.
struct Operands {
  const TensorMap& x;
  const u8* weights;
  const float *block_scales, *row_scales, *x_scales;
  int x_pitch, rows, blocks, segments;
};

// One thread: fills the ring with segments [first, last) of K. Weights first, which depend on no kernel before this one.
template <class L, class Scheduler>
__device__ __forceinline__ void produce(const Operands& of, Scheduler scheduler, Ring ring, u32 scales, int first, int last) {
  using namespace ptx;
  constexpr u16 BOTH = 3;
  const int rank = blockIdx.x % 2, tiles = (of.rows + TILE - 1) / TILE;
  const u64 hint = scheduler.pairs > 1 ? EVICT_NORMAL : EVICT_FIRST;
  SegmentEnds ends{of.blocks, of.segments, first};
  const auto load_weights = [&](const WorkTile& t, int k, const Ring& at) {
    const auto source = [&](int i) { return of.weights + (static_cast<u64>(min(t.row_tile + i, tiles - 1)) * of.blocks + k) * TILE_BYTES; };
    const u32 bar = at.full(at.stage), dst = at.weights_at(), to = scales + at.stage * L::SCALES;
    const int there = min(L::ROW_TILES, tiles - t.row_tile), scaled = of.block_scales ? there * 32 : ends.is_last(k) ? there * TILE * 4 : 0;
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
    if (scaled) {
      const float* const from = of.block_scales ? of.block_scales + (static_cast<u64>(k) * tiles + t.row_tile) * 8 : of.row_scales + t.row_tile * TILE;
      bulk_load(to, from, scaled, bar, EVICT_NORMAL);
    }
  };
  const auto load_x = [&](const WorkTile& t, int k, const Ring& at) {
    const u32 bar = at.full(at.stage);
    tensor_load_2d(at.x_at(), &of.x, k * (BLOCK_K / 2), t.token0, bar);  // the map's elements are pairs of bytes
    bulk_load(scales + at.stage * L::SCALES + L::WEIGHT_SCALES, of.x_scales + static_cast<size_t>(k / SCALE_BLOCKS) * of.x_pitch + t.token0,
              L::TOKENS * 4, bar, EVICT_NORMAL);
  };
  fill_ring<WorkTile>(scheduler, ring, segment_begin(of.blocks, of.segments, first), segment_begin(of.blocks, of.segments, last),
                      load_weights, load_x);
}

// A warpgroup's sums of one work tile after another.
template <class L>
struct TallConsumer {
  static constexpr int ROWS = L::ROWS, REGS = ROWS / 2;
  bool by_block;  // weights have scales for 128 columns of eight rows, not of rows
  int group, warp, lane;
  u32 scales;
  Ring ring;
  float sum[ROWS / 2];

  // Queues the products of one stage. keep: they are added to those before.
  __device__ __forceinline__ void multiply(float (&acc)[REGS], int stage, bool keep) {
    const u32 a = ring.x + stage * ring.x_pitch + group * (64 * BLOCK_K), b = ring.weights + stage * ring.weights_pitch;
    ptx::wgmma_pin(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int j = 0; j < BLOCK_K / 32; j++)
      ptx::wgmma_e4m3<ROWS>(acc, ptx::wgmma_operand(a + 32 * j), ptx::wgmma_operand(b + 32 * j), keep || j > 0);
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
  // Waits for what `acc` comes to, adds it to the sums and lets go of `stage`, the last one that it is of. ENDS: so does the
  // segment; the sums are then scaled by row.
  template <bool BY_BLOCK, bool ENDS>
  __device__ __forceinline__ void promote(float (&acc)[REGS], int stage) {
    const float2 x = scales_of_tokens(stage);
    const u32 of_weights = scales + stage * L::SCALES;
    u32 seen = bits_of(x);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(acc);
    if constexpr (BY_BLOCK) {
#pragma unroll
      for (int q = 0; q < ROWS / 32; q++) {  // four groups of eight rows
        float w[4];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(w[0]), "=f"(w[1]), "=f"(w[2]), "=f"(w[3])
                     : "r"(of_weights + q * 16));
        seen |= __float_as_uint(w[0]);
#pragma unroll
        for (int i = 0; i < 16; i++) {
          float& s = sum[16 * q + i];
          s = fmaf(acc[16 * q + i], __fmul_rn(i / 2 % 2 ? x.y : x.x, w[i / 4]), s);
        }
      }
      release_read<L::SHARERS>(ring, stage, lane, seen);
      return;
    }
    if (!ENDS) release_read<L::SHARERS>(ring, stage, lane, seen);
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = fmaf(acc[i], i / 2 % 2 ? x.y : x.x, sum[i]);
    if constexpr (ENDS) {
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) {
        float2 by_row;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(by_row.x), "=f"(by_row.y) : "r"(of_weights + (j * 8 + lane % 4 * 2) * 4));
        seen |= bits_of(by_row);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[4 * j + i] = __fmul_rn(sum[4 * j + i], i % 2 ? by_row.y : by_row.x);
      }
      release_read<L::SHARERS>(ring, stage, lane, seen);
    }
  }
  // Queues the products of so many stages, lets go of all but the last and returns its number.
  template <int GROUP>
  __device__ __forceinline__ int multiply_group(float (&acc)[REGS]) {
    static_assert(GROUP <= 2);
    int stage = take();
    multiply(acc, stage, false);
    if constexpr (GROUP == 2) {
      const int before = stage;
      stage = take();
      multiply(acc, stage, true);
      ptx::wgmma_wait<1>();
      release<L::SHARERS>(ring, before, lane);
    }
    return stage;
  }
  // Adds up `count` blocks of K, a segment: groups of two blocks, or each block where its weights have scales of their own. The
  // last group is apart: with a branch around its row scales, stages would be given back after all additions.
  template <bool BY_BLOCK>
  __device__ __forceinline__ void add_blocks(int count) {
    constexpr int GROUP = BY_BLOCK ? 1 : SCALE_BLOCKS;
    float acc[REGS];
#pragma unroll 1
    for (; count > GROUP; count -= GROUP) promote<BY_BLOCK, false>(acc, multiply_group<GROUP>(acc));
    if (count == GROUP)
      promote<BY_BLOCK, true>(acc, multiply_group<GROUP>(acc));
    else if (count > 0)
      promote<BY_BLOCK, true>(acc, multiply_group<1>(acc));
  }

  // Sums `count` blocks of K, a segment.
  __device__ __forceinline__ void segment(int count) {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sum[i] = 0.f;
    if (by_block)
      add_blocks<true>(count);
    else
      add_blocks<false>(count);
  }
};

}  // namespace rvllm::fp8
