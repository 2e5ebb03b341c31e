// Products of e4m3 weights and many tokens for Hopper. Unlike in gemm_sm90.cu, tokens are the 64-row side of wgmma and
// weights the wide one: a thread then needs the scales of two tokens for 256 of K, not of a quarter of the tile's tokens.
// In work tiles of 128 tokens by 192 or 128 rows, each of the two consumer warpgroups with 64 tokens and an accumulator:
//
//   ONE   weights of one segment. A tile leaves while the next one is summed. The two blocks of a cluster take the same rows
//         and neighbouring tokens: each weight is loaded once and multicast. grid (clusters * 2, 1, 1), resident
//   SUM   the same for any number of segments: what those before came to lies in registers, or, where 192 rows leave none, in
//         shared memory
//   PAIR  of two to four segments, few tiles: the blocks of a cluster take the first and the last segments of one tile.
//         grid (2, token tiles, row strips)
//
// The order of every sum is that of gemm_sm90.cu.
#include "gemm/fp8/tall_epilogue.cuh"
#include "gemm/fp8/tall_mainloop.cuh"

namespace rvllm::fp8 {

using namespace gemm;

inline constexpr int GROUP_BARRIER = 8;  // of the first warpgroup; see Named in gemm/epilogue_overlap.cuh

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
__global__ void __launch_bounds__(TallLayout<ROWS, MODE>::THREADS, 1)
    gemm_tall(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
              const float* __restrict__ row_scales, const void* x_rows, const float* x_scales, int x_width, int x_pitch,
              void* out, const void* bias, const void* residual, int kind, int tokens, int rows, int pitch, float scale,
              float soft_cap, int blocks, int segments) {
  using L = TallLayout<ROWS, MODE>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const Ring ring = tall_ring<L>(base);
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  // The segments of this block; of a PAIR, the first block has as many as the second or one more.
  const int half = (segments + 1) / 2, second = MODE == PAIR ? blockIdx.x : 0;
  const int from = second ? half : 0, to = MODE == PAIR && !second ? half : segments;
  griddep_launch();
  if (threadIdx.x == L::CONSUMERS) {
    tensor_map_prefetch(&x);
    begin_ring(ring, L::CONSUMERS / 32 * L::SHARERS);
  }
  cluster_sync();
  typename SchedulerOf<MODE, L::ROW_TILES>::Type scheduler(rows, tokens, L::TOKENS);
  const int group = warp / 4, storer = static_cast<int>(threadIdx.x) - L::CONSUMERS - 32;
  WorkTile t{};
  bool stores = storer >= 0 && MODE != PAIR;
  if (warp >= L::CONSUMERS / 32) {
    registers_lower<72>();
    if (storer == -32)
      produce<L>({x, weights, block_scales, row_scales, x_scales, x_pitch, rows, blocks, segments}, scheduler, ring,
                 base + L::SCALES_AT, from, to);
    __syncwarp();
    if (stores) griddep_wait();
    if constexpr (MODE == PAIR) cluster_sync();  // as the consumers do
  } else {
    registers_raise<216>();
    griddep_wait();
    const u32 totals = base + L::ROOM_AT + warp * L::ROOM + lane * 16;
    TallConsumer<L> c{block_scales != nullptr, group, warp, lane, base + L::SCALES_AT, ring, {}};
    auto tiles = scheduler;
    WorkTile next;
    for (bool more = tiles.next(next); more;) {
      t = next;
      float total[L::HELD ? ROWS / 2 : 1];
      for (int s = from; s < to; s++) {
        c.segment(segment_begin(blocks, segments, s + 1) - segment_begin(blocks, segments, s));
        if (MODE == SUM && !L::HELD && s == from && kind != LOGITS) bar_sync(ROOM + group, 128 + STORERS);  // totals take its place
        if constexpr (L::HELD) {
#pragma unroll
          for (int i = 0; i < ROWS / 2; i++) total[i] = s > from ? total[i] + c.sum[i] : c.sum[i];
        } else if constexpr (MODE != ONE) {
          if (s > from && !second) add_kept<false>(totals, c.sum);
          if (s + 1 < to) keep_sums(totals, c.sum);
        }
      }
      if constexpr (L::HELD) {
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) c.sum[i] = total[i];
      }
      const int row0 = t.row_tile * TILE, token0 = t.token0 + group * 64;
      more = tiles.next(next);
      stores = !more;
      if constexpr (MODE == PAIR) {
        join_pair(c.sum, second, group, segments - half > 1, totals, base + warp * L::TOTALS + lane * 16);
        stores = group == second;
        if (!stores) continue;
      }
      if (kind == LOGITS) {
        write_logits<T, ROWS>(e, c.sum, lane, row0, token0 + warp % 4 * 16);
        continue;
      }
      if (MODE != PAIR && !L::TOTALS) bar_sync(ROOM + group, 128 + STORERS);  // the tile before has left
      if (L::TOTALS) bar_sync(GROUP_BARRIER + group, 128);  // all of the group's totals have been read
      stage_tokens<T, ROWS>(e, c.sum, base + L::ROOM_AT + group * 4 * L::ROOM, warp, lane, row0);
      if (more)
        bar_arrive(READY + group, 128 + STORERS);
      else
        bar_sync(GROUP_BARRIER + group, 128);
    }
  }
  if (stores && kind != LOGITS) store_tiles<T, ROWS, L>(e, scheduler, t, shared + L::ROOM_AT, storer, group);
  cluster_sync();  // nobody leaves while the other block's loads or arrivals may still reach it
}

}  // namespace rvllm::fp8
