// As gemm_sm90_tall.cu: products of e4m3 weights and many tokens, which are the 64-row side of wgmma. In work tiles of 128 tokens
// by 192 or 128 rows, each of the two consumer warpgroups with 64 tokens:
//
//   ONE   weights of one segment: one accumulator as wide as the rows, and a tile leaves while the next one is summed. The
//         two blocks of a cluster take the same rows and neighbouring tokens: each weight is loaded once and multicast. grid
//         (clusters * 2, 1, 1), resident
//   PAIR  of two to four segments, few tiles: the blocks of a cluster take the first and the last segments of one tile, and
//         there are two accumulators for blocks of K in turns. grid (2, token tiles, row strips)
//
// The order of every sum is that of gemm_sm90.cu.
#include "gemm/fp8/fp8.cuh"
#include "gemm/fp8/tall_epilogue.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/tile_scheduler.cuh"
#include "ptx/wgmma_fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;

inline constexpr int GROUP_BARRIER = 8;  // of the first warpgroup; see Named in gemm/epilogue_overlap.cuh

enum Mode { ONE, PAIR };

template <int ROWS, Mode MODE>
struct OverlappedLayout {
  static constexpr int TOKENS = 128, CONSUMERS = 256, THREADS = CONSUMERS + 128, ROW_TILES = ROWS / TILE;
  static constexpr int WEIGHTS = ROW_TILES * TILE_BYTES, X = TOKENS * BLOCK_K;
  static constexpr int WEIGHT_SCALES = ROW_TILES * 32, SCALES = WEIGHT_SCALES + TOKENS * 4, STAGE = WEIGHTS + X + SCALES;
  static constexpr int STAGED = 16 * ROWS * 2;               // a warp's outputs on their way out
  static constexpr int TOTALS = MODE == ONE ? 0 : ROWS / 2 * 32 * 4;  // a warp's sums of the segments before
  static constexpr int ROOM = TOTALS > STAGED ? TOTALS : STAGED;
  static constexpr int BARRIERS = 128, LIMIT = 232448;
  static constexpr int STAGES = (LIMIT - BARRIERS - CONSUMERS / 32 * ROOM) / STAGE;
  static constexpr int BYTES = STAGES * STAGE + CONSUMERS / 32 * ROOM + BARRIERS;
  static constexpr int SHARERS = MODE == PAIR ? 1 : 2;  // blocks that a load of weights is for
  static_assert(STAGES >= 3 && STAGES * 16 <= BARRIERS && SCALES % 16 == 0);
  static_assert(MODE != PAIR || CONSUMERS / 32 * TOTALS <= STAGES * (WEIGHTS + X));
};

// The tile of a PAIR's cluster.
template <int ROW_TILES>
struct OneTile {
  static constexpr int pairs = 1;
  bool left = true;
  __device__ OneTile(int, int, int) {}
  __device__ bool next(WorkTile& t) {
    t = {static_cast<int>(blockIdx.z) * ROW_TILES, static_cast<int>(blockIdx.y) * 128};
    const bool more = left;
    left = false;
    return more;
  }
};

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
template <class T, int ROWS, Mode MODE>
struct Consumer {
  using L = OverlappedLayout<ROWS, MODE>;
  static constexpr int REGS = ROWS / 2;
  const float *block_scales, *row_scales;
  int tiles, group, warp, lane;
  u32 scales;
  Ring ring;
  float sum[ROWS / 2];

  __device__ __forceinline__ void release_stage(int stage) { release<L::SHARERS>(ring, stage, lane); }

  // Queues the products of one stage.
  __device__ __forceinline__ void multiply(float (&acc)[REGS], int stage) {
    const u32 a = ring.x + stage * ring.x_pitch + group * (64 * BLOCK_K), b = ring.weights + stage * ring.weights_pitch;
    ptx::wgmma_pin(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int j = 0; j < BLOCK_K / 32; j++)
      ptx::wgmma_e4m3<ROWS>(acc, ptx::wgmma_operand(a + 32 * j), ptx::wgmma_operand(b + 32 * j), j > 0);
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
  // Adds what `acc` has come to, of a stage.
  __device__ __forceinline__ void promote(float (&acc)[REGS], int stage, float2 x) {
    ptx::wgmma_pin(acc);
    if (block_scales) {
#pragma unroll
      for (int q = 0; q < ROWS / 32; q++) {  // four groups of eight rows
        float w[4];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(w[0]), "=f"(w[1]), "=f"(w[2]), "=f"(w[3])
                     : "r"(scales + stage * L::SCALES + q * 16));
#pragma unroll
        for (int i = 0; i < 16; i++) {
          float& s = sum[16 * q + i];
          s = fmaf(acc[16 * q + i], __fmul_rn(i / 2 % 2 ? x.y : x.x, w[i / 4]), s);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < REGS; i++) sum[i] = fmaf(acc[i], i / 2 % 2 ? x.y : x.x, sum[i]);
    }
  }

  // Sums `count` blocks of K, of the rows from 64-row tile `tile` on.
  __device__ __forceinline__ void segment(int count, int tile) {
    using namespace ptx;
    if (row_scales && lane < ROWS / 32)
      asm volatile("prefetch.global.L1 [%0];" ::"l"(row_scales + min(tile + lane / 2, tiles - 1) * TILE + lane % 2 * 32));
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sum[i] = 0.f;
    if constexpr (MODE == ONE) {
      float acc[REGS];
#pragma unroll 1
      for (int k = 0; k < count; k++) {
        const int stage = take();
        multiply(acc, stage);
        const float2 x = scales_of_tokens(stage);
        wgmma_wait<0>();
        promote(acc, stage, x);
        release_stage(stage);
      }
    } else {  // the accumulators are blocks of K in turns
      float first[REGS], second[REGS];
      const auto finish = [&](float(&acc)[REGS], int stage) {
        promote(acc, stage, scales_of_tokens(stage));
        release_stage(stage);
      };
      int at_first = take(), at_second, k = 0;
      multiply(first, at_first);
#pragma unroll 1
      for (; k + 2 < count; k += 2) {
        at_second = take();
        multiply(second, at_second);
        wgmma_wait<1>();
        finish(first, at_first);
        at_first = take();
        multiply(first, at_first);
        wgmma_wait<1>();
        finish(second, at_second);
      }
      if (k + 1 < count) {
        at_second = take();
        multiply(second, at_second);
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

// A thread's sums in shared memory, 32 threads' side by side.
template <int COUNT>
__device__ __forceinline__ void keep_sums(u32 at, const float (&sum)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4)
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at + i * 128), "f"(sum[i]), "f"(sum[i + 1]), "f"(sum[i + 2]),
                 "f"(sum[i + 3]) : "memory");
}
__device__ __forceinline__ float4 kept_sums(u32 at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
  return v;
}
// sum = kept + sum; REMOTE: in the other block of the cluster.
template <bool REMOTE, int COUNT>
__device__ __forceinline__ void add_kept(u32 at, float (&sum)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const float4 kept = REMOTE ? ptx::cluster_load(at + i * 128) : kept_sums(at + i * 128);
    sum[i] = kept.x + sum[i], sum[i + 1] = kept.y + sum[i + 1], sum[i + 2] = kept.z + sum[i + 2], sum[i + 3] = kept.w + sum[i + 3];
  }
}

// What the blocks of a PAIR's cluster make of their segments' sums. Each finishes 64 tokens: block `second` those of its
// warpgroup `second`, which then has their sums. The first block's segments are one sum, the second's are added to it one by
// one: where it has two (`both`, of the second block's), the first lies at `totals` already. last: in the place of the stages.
template <int COUNT>
__device__ __forceinline__ void join_pair(float (&sum)[COUNT], int second, int group, bool both, u32 totals, u32 last) {
  using namespace ptx;
  bar_sync(1, 256);  // both warpgroups have read their last stage
  if (group != second) keep_sums(second && both ? last : totals, sum);
  cluster_sync();
  if (group != second) return;
  if (!second) {
    add_kept<true>(cluster_map(totals, 1), sum);
    if (both) add_kept<true>(cluster_map(last, 1), sum);
  } else if (both) {
    const u32 there = cluster_map(totals, 0);
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 first = cluster_load(there + i * 128), kept = kept_sums(totals + i * 128);
      sum[i] = first.x + kept.x + sum[i], sum[i + 1] = first.y + kept.y + sum[i + 1];
      sum[i + 2] = first.z + kept.z + sum[i + 2], sum[i + 3] = first.w + kept.w + sum[i + 3];
    }
  } else {
    add_kept<true>(cluster_map(totals, 0), sum);
  }
}

template <Mode MODE, int ROW_TILES>
struct SchedulerOf {
  using Type = PairScheduler<ROW_TILES>;
};
template <int ROW_TILES>
struct SchedulerOf<PAIR, ROW_TILES> {
  using Type = OneTile<ROW_TILES>;
};

// x: tensor map of e4m3 [>= tokens, pitch] in boxes of 128 bytes x 128 rows, 128-byte swizzle. The other parameters are those of
// gemm in gemm_sm90.cu; x_rows and x_width are not looked at.
template <class T, int ROWS, Mode MODE>
__global__ void __launch_bounds__(OverlappedLayout<ROWS, MODE>::THREADS, 1)
    gemm_overlapped(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
              const float* __restrict__ row_scales, const void* x_rows, const float* x_scales, int x_width, int x_pitch,
              void* out, const void* bias, const void* residual, int kind, int tokens, int rows, int pitch, float scale,
              float soft_cap, int blocks, int segments) {
  using L = OverlappedLayout<ROWS, MODE>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  constexpr int X_AT = L::STAGES * L::WEIGHTS, ROOM_AT = X_AT + L::STAGES * L::X;
  constexpr int SCALES_AT = ROOM_AT + L::CONSUMERS / 32 * L::ROOM, BARRIERS_AT = SCALES_AT + L::STAGES * L::SCALES;
  const u32 base = smem(shared);
  const Ring ring{L::STAGES, base, base + X_AT, L::WEIGHTS, L::X, base + BARRIERS_AT};
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  // The segments of this block; of a PAIR, the first block has as many as the second or one more.
  const int half = (segments + 1) / 2, second = MODE == PAIR ? blockIdx.x : 0;
  const int from = second ? half : 0, to = MODE == PAIR && !second ? half : segments;
  griddep_launch();
  if (threadIdx.x == L::CONSUMERS) {
    tensor_map_prefetch(&x);
    for (int s = 0; s < L::STAGES; s++) {
      mbar_init(ring.full(s), 1);
      mbar_init(ring.empty(s), L::CONSUMERS / 32 * L::SHARERS);
    }
    mbar_init_fence();
  }
  cluster_sync();
  typename SchedulerOf<MODE, L::ROW_TILES>::Type scheduler(rows, tokens, L::TOKENS);
  if (warp >= L::CONSUMERS / 32) {
    registers_lower<56>();
    const int storer = threadIdx.x - L::CONSUMERS - 32;
    if (MODE != PAIR && kind != LOGITS && storer >= 0) {
      griddep_wait();
      store_tiles<T, ROWS, L>(e, scheduler, shared + ROOM_AT, storer);
    } else if (storer == -32) {
      produce<L>(x, weights, block_scales, x_scales, x_pitch, scheduler, ring, base + SCALES_AT, rows, blocks,
                 segment_start(blocks, segments, from), segment_start(blocks, segments, to));
    }
    __syncwarp();
    if constexpr (MODE == PAIR) cluster_sync();  // as the consumers do
  } else {
    registers_raise<224>();
    griddep_wait();
    const int group = warp / 4;
    const u32 totals = base + ROOM_AT + warp * L::ROOM + lane * 16;
    Consumer<T, ROWS, MODE> c{block_scales, row_scales, (rows + TILE - 1) / TILE, group, warp, lane, base + SCALES_AT, ring, {}};
    WorkTile t;
    while (scheduler.next(t)) {
      for (int s = from; s < to; s++) {
        c.segment(segment_start(blocks, segments, s + 1) - segment_start(blocks, segments, s), t.row_tile);
        if (MODE != PAIR && s == from && kind != LOGITS) bar_sync(ROOM + group, 128 + STORERS);  // the tile before has left
        if constexpr (MODE != ONE) {
          if (s > from && !second) add_kept<false>(totals, c.sum);
          if (s + 1 < to) keep_sums(totals, c.sum);
        }
      }
      if constexpr (MODE == PAIR) {
        join_pair(c.sum, second, group, segments - half > 1, totals, base + warp * L::TOTALS + lane * 16);
        if (group != second) continue;
      }
      const int row0 = t.row_tile * TILE, token0 = t.token0 + group * 64;
      if (kind == LOGITS) {
        write_logits<T, ROWS>(e, c.sum, lane, row0, token0 + warp % 4 * 16);
        continue;
      }
      u8* const staging = shared + ROOM_AT + group * 4 * L::ROOM;
      if (MODE != ONE) bar_sync(GROUP_BARRIER + group, 128);  // all of the group's totals have been read
      stage_tokens<T, ROWS>(e, c.sum, smem(staging), warp, lane, row0);
      if constexpr (MODE == PAIR) {
        bar_sync(GROUP_BARRIER + group, 128);
        store_tokens<T, ROWS, 128>(e, staging, threadIdx.x % 128, row0, token0, min(64, tokens - token0));
      } else {
        bar_arrive(READY + group, 128 + STORERS);
      }
    }
    if (MODE != PAIR && kind != LOGITS) bar_sync(ROOM + group, 128 + STORERS);  // as often as the storers arrive
  }
  cluster_sync();  // nobody leaves while the other block's loads or arrivals may still reach it
}

}  // namespace rvllm::fp8
