// Products of e4m3 weights and activations for Hopper. Loads, roles and epilogues are those of gemm/gemm_sm90.cu: 128
// columns of e4m3 take the bytes that 64 of 16 bits do. What differs is the sum: the tensor cores add up as many columns as
// share a scale, then the result is scaled and added to float32 registers, in ascending order.
//
//   SPLIT  a block sums one segment of K; the segments of a tile form a cluster and are added through
//          distributed shared memory. grid (segments, token tiles, row pairs), cluster (segments, 1, 1).
//   WALK   for weights with one segment: resident blocks walk over tiles. grid (blocks, 1, 1).
//   SUM    as WALK for any number of segments, whose running sum is kept in registers too.
//
// RESIDENT kernels, for few tokens, hold all activations of a block in shared memory. Where these come in 16 bits they are
// quantised on the way in, as fp8/quantise.cu does: it costs no launch, and weights are on their way meanwhile.
//
// Up to 64 tokens leave registers for a second accumulator: while one sum is scaled, the next products are under way.
#include "gemm/cluster_fetch.cuh"
#include "gemm/fp8/resident.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/fill_ring.cuh"
#include "gemm/tile_scheduler.cuh"
#include "ptx/wgmma_fp8.cuh"

namespace rvllm::fp8 {

enum Mode { SPLIT, WALK, SUM };

template <int TOKENS, Mode MODE, bool RESIDENT>
struct Layout {
  static constexpr bool SINGLE = TOKENS >= 128;  // no registers for a second accumulator
  static constexpr bool MANY_REGISTERS = MODE == WALK ? TOKENS >= 160 : MODE == SUM && TOKENS >= 128;
  static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : 32);
  static constexpr int WEIGHTS = 2 * TILE_BYTES, X = RESIDENT ? 0 : TOKENS * BLOCK_K;
  static constexpr int WEIGHT_SCALES = 2 * 8 * 4;                       // of two tiles, one for eight rows
  static constexpr int SCALES = RESIDENT ? 128 : (WEIGHT_SCALES + TOKENS * 4 + 127) / 128 * 128;
  static constexpr int STAGE = WEIGHTS + X + SCALES;
  static constexpr int RESIDENT_BLOCK = RESIDENT ? TOKENS * (BLOCK_K + 4) : 0;  // x of 128 columns and room for scales
  static constexpr int CHUNK = TOKENS % 64 == 0 ? 64 : TOKENS < 32 ? TOKENS : 32;  // tokens staged at a time
  static constexpr int STAGE_PITCH = (TILE + 8) * 2;
  static constexpr int SPLIT_PITCH = 2 * TILE + 4;
  static constexpr int SUMS = (CHUNK < 32 ? CHUNK : 32) * (TILE + 4) * 4;
  static constexpr int PER_GROUP = CHUNK * STAGE_PITCH > SUMS ? CHUNK * STAGE_PITCH : SUMS;
  static constexpr int STAGING = MODE == SPLIT ? 0 : 2 * PER_GROUP;
  static constexpr int HELD = TOKENS <= 16 ? 1 : TOKENS == 64 ? 4 : 2;
  static constexpr int BARRIERS = 256, MOST = 12;
};

__device__ __forceinline__ float smem_float(u32 at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ float2 smem_float2(u32 at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}

// A thread block's share of the product: what it was given, and its roles. The roles are functions; all are inlined.
template <class T, int TOKENS, Mode MODE, int CLUSTER, bool RESIDENT>
struct Block {
  using L = Layout<TOKENS, MODE, RESIDENT>;
  static constexpr int REGS = TOKENS / 2;
  static constexpr u16 ALL = (1 << CLUSTER) - 1;
  using Sums = float[REGS];

  Epilogue e;
  const TensorMap* x;
  const u8* weights;
  const float *block_scales, *row_scales, *x_scales;
  int x_pitch;
  u8* shared;
  int blocks, segments;  // of K
  Ring ring;
  u32 scales_base, resident, resident_scales, staging_base;
  int tiles, warp, lane, group, row, column;  // row, column: of a thread's first accumulator, within its tile
  Walk<TOKENS, CLUSTER, false> walk;
  int k0, k1;  // the blocks of K that are summed here
  bool once = true;

  __device__ __forceinline__ Block(const Epilogue& e, const TensorMap* x, const u8* weights, const float* block_scales,
                                   const float* row_scales, const float* x_scales, int x_pitch, u8* shared, int blocks, int segments)
      : e(e), x(x), weights(weights), block_scales(block_scales), row_scales(row_scales), x_scales(x_scales), x_pitch(x_pitch),
        shared(shared), blocks(blocks), segments(segments), tiles((e.rows + TILE - 1) / TILE), walk(e.rows, e.tokens), k0(0), k1(blocks) {
    const int held_blocks = RESIDENT ? MODE == SPLIT ? widest_segment(blocks, segments) : blocks : 0;
    const int bytes = ptx::dynamic_smem_bytes();
    const int stages = min(L::MOST, (bytes - L::BARRIERS - L::STAGING - held_blocks * L::RESIDENT_BLOCK) / L::STAGE);
    const u32 base = ptx::smem(shared), x_base = base + stages * L::WEIGHTS;
    ring = {stages, base, x_base, L::WEIGHTS, L::X, base + bytes - L::BARRIERS};
    resident = x_base + stages * L::X, staging_base = resident + held_blocks * TOKENS * (RESIDENT ? BLOCK_K : 0);
    scales_base = staging_base + L::STAGING, resident_scales = scales_base + stages * L::SCALES;
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    group = warp / 4, row = warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
    if constexpr (MODE == SPLIT) {
      k0 = segment_begin(blocks, segments, blockIdx.x);
      k1 = segment_begin(blocks, segments, blockIdx.x + 1);
    }
  }

  __device__ __forceinline__ int token0() const { return blockIdx.y * TOKENS; }   // SPLIT: of the one tile that the
  __device__ __forceinline__ int row0() const { return blockIdx.z * 2 * TILE; }   // cluster sums up
  __device__ __forceinline__ u32 scales_at(int stage) const { return scales_base + stage * L::SCALES; }

  __device__ __forceinline__ bool next(Visit& v) {
    if constexpr (MODE != SPLIT) return walk.next(v);
    const bool first = once;
    once = false;
    v = {static_cast<int>(blockIdx.z) * 2, 2, token0(), TOKENS, false};
    return first;
  }

  // One thread, before the others go on.
  __device__ __forceinline__ void begin() const {
    using namespace ptx;
    if constexpr (!RESIDENT) tensor_map_prefetch(x);
    begin_ring(ring, CONSUMERS / 32 * CLUSTER);
  }

  __device__ __forceinline__ void load_weights(const Visit& v, int k, const Ring& at, u64 hint) const {
    using namespace ptx;
    const u32 bar = at.full(at.stage), dst = at.weights_at();
    const int count = max(0, min(v.count, tiles - v.tile));  // of a cluster's last tiles, some blocks have none
    mbar_arrive_expect(bar, count * TILE_BYTES + (block_scales ? count * 32 : 0) + (RESIDENT ? 0 : TOKENS * (BLOCK_K + 4)));
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < count)
        bulk_load(dst + i * TILE_BYTES, weights + (static_cast<u64>(v.tile + i) * blocks + k) * TILE_BYTES, TILE_BYTES, bar, hint);
    if (block_scales && count > 0)
      bulk_load(scales_at(at.stage), block_scales + (static_cast<u64>(k) * tiles + v.tile) * 8, count * 32, bar, EVICT_NORMAL);
  }

  __device__ __forceinline__ void load_x(const Visit& v, int k, const Ring& at) const {
    using namespace ptx;
    if constexpr (!RESIDENT) {
      constexpr int SHARE = TOKENS / CLUSTER;
      const u32 bar = at.full(at.stage), dst = at.x_at();
      // The map's elements are pairs of bytes.
      if constexpr (CLUSTER > 1) {
        const int first = walk.rank * SHARE;
        tensor_load_2d_multicast(dst + first * BLOCK_K, x, k * (BLOCK_K / 2), v.token0 + first, bar, ALL);
      } else {
        tensor_load_2d(dst, x, k * (BLOCK_K / 2), v.token0, bar);
      }
      bulk_load(scales_at(at.stage) + L::WEIGHT_SCALES, x_scales + static_cast<size_t>(k / SCALE_BLOCKS) * x_pitch + v.token0, TOKENS * 4, bar, EVICT_NORMAL);
    }
  }

  // One thread fills the ring.
  __device__ __forceinline__ void produce() {
    const u64 hint = walk.again() ? ptx::EVICT_NORMAL : ptx::EVICT_FIRST;
    fill_ring<Visit>(
        *this, ring, k0, k1, [&](const Visit& v, int k, const Ring& at) { load_weights(v, k, at, hint); },
        [&](const Visit& v, int k, const Ring& at) { load_x(v, k, at); });
  }

  // RESIDENT: all activations of the block, into shared memory.
  __device__ __forceinline__ void bring_activations(const void* rows, int width) const {
    const int first = MODE == SPLIT ? token0() : 0, count = min(TOKENS, e.tokens - first), thread = threadIdx.x;
    zero_resident<TOKENS>(count, k1 - k0, resident, resident_scales, thread);
    ptx::griddep_wait();
    if (x_scales)
      copy_resident<TOKENS>(static_cast<const u8*>(rows) + static_cast<size_t>(first) * blocks * BLOCK_K, x_scales + first,
                            blocks * BLOCK_K, x_pitch, count, k0, k1 - k0, resident, resident_scales, thread);
    else
      quantise_resident<T, TOKENS>(static_cast<const T*>(rows) + static_cast<size_t>(first) * x_pitch, width, x_pitch, count, k0,
                                   k1 - k0, resident, resident_scales, warp, lane);
    ptx::fence_async_shared();
    ptx::bar_sync(1, CONSUMERS);
  }

  // Queues the products of the ring's next block of K, number k; returns its stage. keep: they are added to those before.
  __device__ __forceinline__ int multiply(Sums& acc, int k, bool keep) {
    using namespace ptx;
    const int stage = ring.stage;
    mbar_wait(ring.full(stage), ring.phase);
    const u32 a = ring.weights_at() + group * TILE_BYTES;
    const u32 b = RESIDENT ? resident + (k - k0) * (TOKENS * BLOCK_K) : ring.x_at();
    wgmma_pin(acc);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < BLOCK_K / 32; j++) wgmma_e4m3<TOKENS>(acc, wgmma_operand(a + 32 * j), wgmma_operand(b + 32 * j), keep || j > 0);
    wgmma_commit();
    wgmma_pin(acc);
    ring.advance();
    return stage;
  }

  // Adds the products of the blocks that share a scale, the last of them block k in `stage`, to the sums; the stage is free then.
  __device__ __forceinline__ void promote(Sums& sum, Sums& acc, int k, int stage) const {
    const u32 scales = scales_at(stage);
    const u32 xs = (RESIDENT ? resident_scales + (k - k0) / SCALE_BLOCKS * TOKENS * 4 : scales + L::WEIGHT_SCALES) + column * 4;
    ptx::wgmma_pin(acc);
    u32 seen = 0;  // of the stage
    if (block_scales) {
      const float2 by_block = smem_float2(scales + (group * 8 + warp % 4 * 2) * 4);
      seen = bits_of(by_block);
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
        const float2 s = smem_float2(xs + 32 * j);
        if (!RESIDENT) seen |= bits_of(s);
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[4 * j + i] = fmaf(acc[4 * j + i], __fmul_rn(i % 2 ? s.y : s.x, i / 2 ? by_block.y : by_block.x), sum[4 * j + i]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++) {
        const float2 s = smem_float2(xs + 32 * j);
        if (!RESIDENT) seen |= bits_of(s);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[4 * j + i] = fmaf(acc[4 * j + i], i % 2 ? s.y : s.x, sum[4 * j + i]);
      }
    }
    release_read<CLUSTER>(ring, stage, lane, seen);
  }

  // Sums blocks [first, last) of 64-row tile `tile`.
  __device__ __forceinline__ void segment(Sums& sum, int tile, int first, int last) {
    float by_row[2] = {1.f, 1.f};
    if (row_scales) {
      const float* at = row_scales + min(tile, tiles - 1) * TILE + row;
      by_row[0] = __ldg(at), by_row[1] = __ldg(at + 8);
    }
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = 0.f;
    if constexpr (L::SINGLE)
      one_by_one(sum, first, last);
    else
      two_under_way(sum, first, last);
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = __fmul_rn(sum[i], by_row[i / 2 % 2]);
  }

  // Queues the products of block k behind those of the block before, in stage `at`, and lets go of that.
  __device__ __forceinline__ void second(Sums& acc, int k, int& at) {
    const int before = at;
    at = multiply(acc, k, true);
    ptx::wgmma_wait<1>();
    release<CLUSTER>(ring, before, lane);
  }

  // Queues the products of block k and adds up those before, of which the last are in stage `at`.
  __device__ __forceinline__ void turn(Sums& sum, Sums& next, Sums& done, int k, int& at) {
    const int before = at;
    at = multiply(next, k, false);
    ptx::wgmma_wait<1>();
    promote(sum, done, k - 1, before);
  }

  // Blocks come in pairs with one scale, or singly where weights have scales of their own for each.
  __device__ __forceinline__ void one_by_one(Sums& sum, int first, int last) {
    const bool pairs = !block_scales;
    const int width = pairs ? SCALE_BLOCKS : 1;
    Sums acc;
#pragma unroll 1
    for (int k = first; k < last; k += width) {
      int at = multiply(acc, k, false);
      if (pairs && k + 1 < last) second(acc, k + 1, at);
      ptx::wgmma_wait<0>();
      promote(sum, acc, k, at);
    }
  }

  // While the products of one pair are scaled, those of the next are under way.
  __device__ __forceinline__ void two_under_way(Sums& sum, int first, int last) {
    const bool pairs = !block_scales;
    const int width = pairs ? SCALE_BLOCKS : 1;
    Sums even, odd;
    int k = first, at = multiply(even, k, false);
#pragma unroll 1
    for (; k + 2 * width < last; k += 2 * width) {
      if (pairs) second(even, k + 1, at);
      turn(sum, odd, even, k + width, at);
      if (pairs) second(odd, k + width + 1, at);
      turn(sum, even, odd, k + 2 * width, at);
    }
    if (pairs && k + 1 < last) second(even, k + 1, at);
    if (k + width < last) {
      turn(sum, odd, even, k + width, at);
      if (pairs && k + width + 1 < last) second(odd, k + width + 1, at);
      ptx::wgmma_wait<0>();
      promote(sum, odd, last - 1, at);
    } else {
      ptx::wgmma_wait<0>();
      promote(sum, even, last - 1, at);
    }
  }

  // The items of a split sum that fall to a block of the cluster.
  __device__ __forceinline__ int split_items(int rank) const {
    return min(TOKENS, e.tokens - token0()) * items_per_token<2 * TILE>(e.kind) * rank / segments;
  }

  // SPLIT: this block's segment, left in shared memory for the cluster.
  __device__ __forceinline__ void leave_segment(Held<T> (&held)[L::HELD]) {
    if (can_hold(e)) hold_items<CONSUMERS>(e, token0(), row0(), split_items(blockIdx.x) + threadIdx.x, held);
    Sums sum;
    segment(sum, blockIdx.z * 2 + group, k0, k1);
    ptx::bar_sync(1, CONSUMERS);  // both warpgroups have read their last stage before partial sums overwrite it
    float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        partial[(8 * j + column + i % 2) * L::SPLIT_PITCH + group * TILE + row + i / 2 * 8] = sum[4 * j + i];
  }

  // SPLIT: every block of the cluster adds up its share of the tile.
  __device__ __forceinline__ void add_up(Held<T> (&held)[L::HELD]) const {
    const auto fetch = [&](int token, int r, float(&q)[4]) {
      const u32 at = ring.weights + (token * L::SPLIT_PITCH + r) * 4;
      fetch_sum<8>(segments, [&](int s) { return ptx::cluster_map(at, s); }, q);
    };
    finish_share<CONSUMERS>(e, token0(), row0(), split_items(blockIdx.x), split_items(blockIdx.x + 1), held, true, fetch);
  }

  // SUM: segment by segment, in ascending order.
  __device__ __forceinline__ void sum_segments(Sums& sum, int tile) {
    Sums total;
    segment(sum, tile, 0, segment_begin(blocks, segments, 1));
#pragma unroll
    for (int i = 0; i < REGS; i++) total[i] = sum[i];
    for (int s = 1; s < segments; s++) {
      segment(sum, tile, segment_begin(blocks, segments, s), segment_begin(blocks, segments, s + 1));
#pragma unroll
      for (int i = 0; i < REGS; i++) total[i] += sum[i];
    }
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = total[i];
  }

  // A visit that has no tile for this warpgroup: it keeps in step with the pipeline.
  __device__ __forceinline__ void pass() {
    for (int k = 0; k < blocks; k++) {
      ptx::mbar_wait(ring.full(ring.stage), ring.phase);
      release<CLUSTER>(ring, ring.stage, lane);
      ring.advance();
    }
  }

  // WALK and SUM: visit after visit.
  __device__ __forceinline__ void sum_visits() {
    u8* staging = shared + (staging_base - ring.weights) + group * L::PER_GROUP;
    Visit v;
    while (next(v)) {
      if (group >= v.count) {
        pass();
        continue;
      }
      Sums sum;
      if constexpr (MODE == SUM)
        sum_segments(sum, v.tile + group);
      else
        segment(sum, v.tile + group, 0, blocks);
      finish_accumulators<T, TOKENS, L::CHUNK, L::STAGE_PITCH>(e, sum, staging, 1 + group, threadIdx.x % 128,
                                                               (v.tile + group) * TILE, v.token0);
    }
  }
};

// x: tensor map of e4m3 [>= tokens, pitch] in boxes of 128 bytes x (TOKENS / CLUSTER), 128-byte swizzle; not read where x
// is RESIDENT. Its scales: x_scales [groups, x_pitch]. RESIDENT: x_rows is that e4m3, or, where x_scales is null, 16-bit
// [>= tokens, x_width], x_pitch elements apart.
// weights, block_scales (or null), row_scales (or null): see fp8.cuh. blocks: ceil(K / 128). The rest: see Epilogue.
template <class T, int TOKENS, Mode MODE, int CLUSTER, bool RESIDENT>
__global__ void __launch_bounds__(Layout<TOKENS, MODE, RESIDENT>::THREADS, 1)
    gemm(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
         const float* __restrict__ row_scales, const void* x_rows, const float* x_scales, int x_width, int x_pitch,
         void* out, const void* bias, const void* residual, int kind, int tokens, int rows, int pitch, float scale,
         float soft_cap, int blocks, int segments) {
  using L = Layout<TOKENS, MODE, RESIDENT>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  Block<T, TOKENS, MODE, CLUSTER, RESIDENT> block(e, &x, weights, block_scales, row_scales, x_scales, x_pitch, shared, blocks, segments);
  Held<T> held[L::HELD];

  griddep_launch();
  if (threadIdx.x == CONSUMERS) block.begin();
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();

  if (block.warp >= CONSUMERS / 32) {
    if constexpr (L::MANY_REGISTERS) registers_lower<40>();
    if (threadIdx.x == CONSUMERS)
      block.produce();
    else
      griddep_wait();
    __syncwarp();
  } else {
    if constexpr (L::MANY_REGISTERS) registers_raise<232>();
    if constexpr (RESIDENT)
      block.bring_activations(x_rows, x_width);
    else
      griddep_wait();
    if constexpr (MODE == SPLIT)
      block.leave_segment(held);
    else
      block.sum_visits();
  }

  if constexpr (MODE == SPLIT) {
    cluster_sync();
    if (block.warp < CONSUMERS / 32)
      block.add_up(held);
    else
      cluster_arrive();
    cluster_wait();  // nobody leaves while its shared memory is being read
  } else if constexpr (CLUSTER > 1) {
    cluster_sync();
  }
}

}  // namespace rvllm::fp8
