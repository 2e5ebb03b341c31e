// Matrix kernels for Hopper: weights stream through shared memory as the 64-row side of wgmma, tokens are
// the N side. 8 consumer warps (two warpgroups, each with 64 rows of W) and one producer warp; where the
// accumulators need more than 168 registers the producer is a warpgroup too, which gives its registers away.
//
//   SPLIT  a block sums one segment of K; the segments of a tile form a cluster and are added through
//          distributed shared memory: up to 64 tokens are sent to the block that adds them (gemm/cluster_reduce.cuh),
//          more are fetched by it. grid (segments, token tiles, row pairs), cluster (segments, 1, 1).
//   EIGHT  as SPLIT, for clusters of eight: in registers and shared memory for two blocks a multiprocessor. One for each
//          leaves places for 14 clusters on an H200, and 2,048 rows need 16.
//   PAIR   for weights of four segments: a block sums two of them, one after the other, the two blocks of a cluster
//          add up as in SPLIT. grid (2, token tiles, row pairs), cluster (2, 1, 1).
//   WALK   for weights with one segment: resident blocks walk over tiles. grid (blocks, 1, 1).
//   FLOW   as WALK for many tokens: tiles leave while the next are summed, see gemm/epilogue_overlap.cuh.
//   SUM    as WALK for any number of segments, their running sum kept in registers beside the accumulator.
//
// In WALK, FLOW and SUM the blocks of a cluster (CLUSTER along rows) share each load of x by multicast.
#include "gemm/cluster_fetch.cuh"
#include "gemm/cluster_reduce.cuh"
#include "gemm/epilogue_overlap.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/fill_ring.cuh"
#include "gemm/tile_scheduler.cuh"

namespace rvllm::gemm {

enum Mode { SPLIT, PAIR, WALK, SUM, FLOW, EIGHT };
inline constexpr int CONSUMERS = 256;

template <int TOKENS, Mode MODE>
struct Layout {
  static constexpr bool MANY_REGISTERS = MODE != SPLIT && TOKENS >= 160;
  static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : 32);
  static constexpr int WEIGHTS = 2 * TILE_BYTES, X = TOKENS * TILE * 2;
  static constexpr int CHUNK = TOKENS % 64 == 0 ? 64 : TOKENS < 32 ? TOKENS : 32;  // tokens staged at a time
  static constexpr int STAGE_PITCH = (TILE + 8) * 2;    // bytes; spreads stores over all banks
  static constexpr int SPLIT_PITCH = 2 * TILE + 4;      // floats, likewise
  static constexpr int SUMS = (CHUNK < 32 ? CHUNK : 32) * (TILE + 4) * 4;  // float32 on their way to logits
  static constexpr int PER_GROUP = CHUNK * STAGE_PITCH > SUMS ? CHUNK * STAGE_PITCH : SUMS;
  static constexpr bool SUMS_UP = MODE == SPLIT || MODE == EIGHT || MODE == PAIR;  // the blocks of a cluster add up
  static constexpr int STAGING = SUMS_UP ? 0 : MODE == FLOW ? 2 * FLOW_STAGING : 2 * PER_GROUP;
  static constexpr bool WIDE = MODE == PAIR || (MODE == SPLIT && TOKENS > 128);  // token tiles of many widths, in one kernel
  static constexpr int HELD = TOKENS <= 16 ? 1 : MODE == EIGHT || TOKENS == 32 || TOKENS > 192 ? 2 : 4;  // items of a split sum at once
  static constexpr int BARRIERS = 256, LIMIT = 232448;
  static constexpr int FIT = (LIMIT - STAGING - BARRIERS) / (WEIGHTS + X);
  static constexpr int STAGES = FIT < 12 ? FIT : 12;
  static constexpr int BYTES = STAGES * (WEIGHTS + X) + STAGING + BARRIERS;
  static constexpr bool SENDS = MODE == SPLIT && TOKENS <= 64;  // a block's sums, rather than leave them to be fetched
  static constexpr int PARTS = 8, SENT_HELD = TOKENS <= 32 ? 1 : 2;  // see ClusterReduce
  static_assert(!SENDS || (TOKENS / 8 + PARTS - 1) * CONSUMERS * 16 <= STAGES * (WEIGHTS + X), "parts must fit");
  static constexpr int SLOTS = MODE == PAIR ? 2 : 1;  // partial sums that a block leaves for its cluster
  static_assert(!SUMS_UP || SLOTS * TOKENS * SPLIT_PITCH * 4 <= STAGES * (WEIGHTS + X), "partial sums must fit");
};

// A thread block's share of the product: what it was given, and its roles. The roles are functions; all are inlined.
template <class T, int TOKENS, Mode MODE, int CLUSTER>
struct Block {
  using L = Layout<TOKENS, MODE>;
  using Reduce = ClusterReduce<T, L::PARTS, L::SENT_HELD, CONSUMERS>;
  static constexpr int REGS = TOKENS / 2;
  static constexpr u16 ALL = (1 << CLUSTER) - 1;

  Epilogue e;
  const TensorMap* x;
  const u8* weights;
  u8* shared;
  int blocks, segments;  // of K
  int width;             // tokens of a tile
  int stages, x_bytes, tiles, warp, lane;
  Ring ring;
  Walk<TOKENS, CLUSTER, MODE == FLOW> walk;
  int k0, k1;  // the blocks of K that are summed here
  bool once = true;

  __device__ __forceinline__ Block(const Epilogue& e, const TensorMap* x, const u8* weights, u8* shared, int blocks, int segments, int tile)
      : e(e), x(x), weights(weights), shared(shared), blocks(blocks), segments(segments), width(L::WIDE ? tile : TOKENS),
        x_bytes(width * TILE * 2), tiles((e.rows + TILE - 1) / TILE), walk(e.rows, e.tokens), k0(0), k1(blocks) {
    const u32 base = ptx::smem(shared);
    // A split product is launched with fewer stages where that lets the next kernel's blocks in beside its own.
    stages = L::SUMS_UP ? (ptx::dynamic_smem_bytes() - L::BARRIERS) / (L::WEIGHTS + x_bytes) : L::STAGES;
    ring = {stages, base, base + stages * L::WEIGHTS, L::WEIGHTS, x_bytes, base + stages * (L::WEIGHTS + x_bytes) + L::STAGING};
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // a warp's one number, to the compiler
    lane = threadIdx.x % 32;
    if constexpr (L::SUMS_UP) {
      constexpr int EACH = MODE == PAIR ? 2 : 1;
      k0 = segment_start(blocks, segments, blockIdx.x * EACH);
      k1 = segment_start(blocks, segments, (blockIdx.x + 1) * EACH);
    }
  }

  __device__ __forceinline__ u8* staging() const { return shared + stages * (L::WEIGHTS + x_bytes); }
  __device__ __forceinline__ int token0() const { return blockIdx.y * width; }      // SUMS_UP: of the one tile that the
  __device__ __forceinline__ int row0() const { return blockIdx.z * 2 * TILE; }     // cluster sums up

  __device__ __forceinline__ Reduce reduce() const {
    return Reduce(e, ring.weights, ring.bars + 16 * stages, blockIdx.x, segments, segments, row0(), token0(), width);
  }

  __device__ __forceinline__ bool next(Visit& v) {
    if constexpr (!L::SUMS_UP) return walk.next(v);
    const bool first = once;
    once = false;
    v = {static_cast<int>(blockIdx.z) * 2, 2, token0(), width, false};
    return first;
  }

  // One thread, before the others go on.
  __device__ __forceinline__ void begin() const {
    using namespace ptx;
    tensor_map_prefetch(x);
    if constexpr (L::SENDS) reduce().expect(segments - 1);
    begin_ring(ring, CONSUMERS / 32 * CLUSTER);
  }

  __device__ __forceinline__ void load_weights(const Visit& v, int k, const Ring& at, u64 hint) const {
    using namespace ptx;
    const u32 bar = at.full(at.stage), dst = at.weights_at();
    mbar_arrive_expect(bar, v.count * TILE_BYTES + v.width * TILE * 2);
    if (MODE == FLOW && v.piece) {  // of the same rows as the other block's, which loads the other tile
      const u64 tile = min(v.tile + walk.rank, tiles - 1);
      bulk_load_multicast(dst + walk.rank * TILE_BYTES, weights + (tile * blocks + k) * TILE_BYTES, TILE_BYTES, bar, ALL, hint);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < v.count) {
        const u64 tile = min(v.tile + i, tiles - 1);
        bulk_load(dst + i * TILE_BYTES, weights + (tile * blocks + k) * TILE_BYTES, TILE_BYTES, bar, hint);
      }
  }

  __device__ __forceinline__ void load_x(const Visit& v, int k, const Ring& at) const {
    using namespace ptx;
    constexpr int SHARE = TOKENS / CLUSTER;
    const u32 bar = at.full(at.stage), dst = at.x_at();
    if constexpr (MODE == FLOW) {
      for (int t = v.piece ? 0 : walk.rank * BOX; t < v.width; t += v.piece ? BOX : CLUSTER * BOX) {
        if (v.piece)
          tensor_load_2d(dst + t * TILE * 2, x, k * TILE, v.token0 + t, bar);
        else
          tensor_load_2d_multicast(dst + t * TILE * 2, x, k * TILE, v.token0 + t, bar, ALL);
      }
    } else if constexpr (CLUSTER > 1) {
      const int first = walk.rank * SHARE;
      tensor_load_2d_multicast(dst + first * TILE * 2, x, k * TILE, v.token0 + first, bar, ALL);
    } else {
      tensor_load_2d(dst, x, k * TILE, v.token0, bar);
    }
  }

  // One thread fills the ring.
  __device__ __forceinline__ void produce() {
    // Weights that are read again in a later round, for other tokens, may stay in L2.
    const u64 hint = walk.again() ? ptx::EVICT_NORMAL : ptx::EVICT_FIRST;
    fill_ring<Visit>(
        *this, ring, k0, k1, [&](const Visit& v, int k, const Ring& at) { load_weights(v, k, at, hint); },
        [&](const Visit& v, int k, const Ring& at) { load_x(v, k, at); });
  }

  // FLOW: the warps beside the producer's take finished tiles from shared memory to where they belong.
  __device__ __forceinline__ void store() {
    using namespace ptx;
    const int thread = threadIdx.x - CONSUMERS - 32;
    if (thread < 0) return;
    bar_arrive(ROOM, 128 + STORERS);
    bar_arrive(ROOM + 1, 128 + STORERS);
    Visit v;
    while (next(v)) {
      const int limit = min(v.width, e.tokens - v.token0), count = phases<FLOW_STAGING>(e, limit);
      const int step = step_tokens<FLOW_STAGING>(e.kind);
      for (int p = 0; p < count; p++)
        for (int g = 0; g < 2; g++) {
          bar_sync(READY + g, 128 + STORERS);
          store_outputs<T>(e, staging() + g * FLOW_STAGING, thread, (v.tile + g) * TILE, v.token0 + p * step,
                           min(step, limit - p * step));
          __syncwarp();
          bar_arrive(ROOM + g, 128 + STORERS);
        }
    }
  }

  template <int N>
  __device__ __forceinline__ void sum(float (&acc)[N], int first, int last) {
    sum_blocks<T, CLUSTER>(acc, ring, warp / 4, lane, first, last);
  }

  // SENDS: the block's sum goes to the blocks of the cluster that add it up.
  __device__ __forceinline__ void sum_and_send() {
    float acc[REGS];
    Reduce sums = reduce();
    sums.prepare();
    sum(acc, k0, k1);
    ptx::cluster_sync();  // all have read their last stage before parts overwrite it
    sums.send(acc, blockIdx.x);
    sums.finish_all();
  }

  // The items of the sum that fall to a block of the cluster.
  __device__ __forceinline__ int split_items(int rank) const {
    const int count = min(width, e.tokens - token0());
    const int items = count * items_per_token<2 * TILE>(e.kind);
    // A pair's first block has two sums to fetch, its second one.
    return MODE == PAIR ? (rank == 0 ? 0 : rank == 1 ? items / 3 : items) : items * rank / segments;
  }

  // A warpgroup's sums, left in shared memory at `partial` for the cluster.
  __device__ __forceinline__ void leave(float* partial, const float (&sums)[REGS]) const {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
      if (!L::WIDE || 8 * j < width)
#pragma unroll
        for (int i = 0; i < 4; i++) partial[(8 * j + i % 2) * L::SPLIT_PITCH + i / 2 * 8] = sums[4 * j + i];
  }

  // A thread's place in its block's partial sums.
  __device__ __forceinline__ float* partial_sums() const {
    const int row = warp / 4 * TILE + warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
    return reinterpret_cast<float*>(shared) + column * L::SPLIT_PITCH + row;
  }

  // PAIR: both segments of the block. The first block's are one sum, the second's are added to it one by one.
  __device__ __forceinline__ void leave_pair() {
    float acc[REGS], sum[REGS];
    const int middle = segment_start(blocks, segments, 2 * blockIdx.x + 1);
    of_width<128, 144, 160, 176, 192>(width, acc, [&](auto& some) {
      this->sum(some, k0, middle);
#pragma unroll
      for (int i = 0; i < sizeof(some) / sizeof(float); i++) sum[i] = some[i];
      this->sum(some, middle, k1);
    });
    // Both warpgroups have read their last stage before partial sums overwrite it.
    ptx::bar_sync(1, CONSUMERS);
    float* partial = partial_sums();
    if (blockIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < REGS; i++) acc[i] = sum[i] + acc[i];
      leave(partial, acc);
    } else {
      leave(partial, sum);
      leave(partial + width * L::SPLIT_PITCH, acc);
    }
  }

  __device__ __forceinline__ void leave_segment() {
    float acc[REGS];
    if constexpr (L::WIDE)
      of_width<144, 160, 176, 192, 208, 224, 240, 256>(width, acc, [&](auto& part) { sum(part, k0, k1); });
    else
      sum(acc, k0, k1);
    ptx::bar_sync(1, CONSUMERS);
    leave(partial_sums(), acc);
  }

  // Every block of the cluster adds up its share of the tile.
  __device__ __forceinline__ void sum_up() {
    using namespace ptx;
    Held<T> held[L::HELD];
    if constexpr (MODE == PAIR) {
      leave_pair();
    } else {
      if (can_hold(e)) hold_items<CONSUMERS>(e, token0(), row0(), split_items(blockIdx.x) + threadIdx.x, held);
      leave_segment();
    }
    cluster_sync();
    const auto fetch = [&](int token, int row, float(&q)[4]) {
      const u32 at = ring.weights + (token * L::SPLIT_PITCH + row) * 4;
      if constexpr (MODE == PAIR)
        fetch_sum<3>(3, [&](int s) { return cluster_map(at + s / 2 * width * L::SPLIT_PITCH * 4, (s + 1) / 2); }, q);
      else
        fetch_sum<8>(segments, [&](int s) { return cluster_map(at, s); }, q);
    };
    finish_share<CONSUMERS>(e, token0(), row0(), split_items(blockIdx.x), split_items(blockIdx.x + 1), held, MODE != PAIR, fetch);
  }

  // A visit that has no tile for this warpgroup: it keeps in step with the pipeline.
  __device__ __forceinline__ void pass() {
    for (int k = 0; k < blocks; k++) {
      ptx::mbar_wait(ring.full(ring.stage), ring.phase);
      release<CLUSTER>(ring, ring.stage, lane);
      ring.advance();
    }
  }

  // SUM: segment by segment, in ascending order.
  __device__ __forceinline__ void sum_segments(float (&acc)[REGS]) {
    float total[REGS];
    sum(acc, 0, segment_start(blocks, segments, 1));
#pragma unroll
    for (int i = 0; i < REGS; i++) total[i] = acc[i];
    for (int s = 1; s < segments; s++) {
      sum(acc, segment_start(blocks, segments, s), segment_start(blocks, segments, s + 1));
#pragma unroll
      for (int i = 0; i < REGS; i++) total[i] += acc[i];
    }
#pragma unroll
    for (int i = 0; i < REGS; i++) acc[i] = total[i];
  }

  // WALK, FLOW and SUM: visit after visit.
  __device__ __forceinline__ void sum_visits() {
    const int group = warp / 4, thread = threadIdx.x % 128;
    float acc[REGS];
    Visit v;
    while (next(v)) {
      if (group >= v.count) {
        pass();
        continue;
      }
      if constexpr (MODE == SUM) {
        sum_segments(acc);
      } else if constexpr (MODE == FLOW) {  // narrow tiles are summed in the first of the accumulators
        const int there = (e.tokens - v.token0 + 15) / 16 * 16, least = min(v.width, 128);
        of_width<64, 128, 144, 160, 176, 192, 208, 224, 240, 256>(
            v.piece ? v.width : max(least, min(v.width, there)), acc, [&](auto& part) { sum(part, 0, blocks); });
      } else {
        sum(acc, 0, blocks);
      }
      if constexpr (MODE == FLOW)
        stage_outputs<T, TOKENS, FLOW_STAGING>(e, acc, ptx::smem(staging()) + group * FLOW_STAGING, group, thread,
                                               (v.tile + group) * TILE, v.token0, min(v.width, e.tokens - v.token0));
      else  // with more residuals of a chunk registers are spilled
        finish_accumulators<T, TOKENS, L::CHUNK, L::STAGE_PITCH, MODE == SUM && L::CHUNK == 32>(
            e, acc, staging() + group * L::PER_GROUP, 1 + group, thread, (v.tile + group) * TILE, v.token0);
    }
    if constexpr (MODE == FLOW) ptx::bar_sync(ROOM + group, 128 + STORERS);  // as often as the storers arrive
  }
};

// x: tensor map of [>= tokens, K] in boxes of 64 x (FLOW: BOX, SPLIT, PAIR: tile, else TOKENS /
// CLUSTER), 128-byte swizzle. weights: packed. blocks: ceil(K / 64). tile: tokens of a tile, TOKENS unless WIDE.
// The rest: see Epilogue.
template <class T, int TOKENS, Mode MODE, int CLUSTER>
__global__ void __launch_bounds__(Layout<TOKENS, MODE>::THREADS, MODE == EIGHT ? 2 : 1)
    gemm(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, void* out, const void* bias,
         const void* residual, int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks,
         int segments, int tile) {
  using L = Layout<TOKENS, MODE>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  e.best_only = e.asks_for_best();
  Block<T, TOKENS, MODE, CLUSTER> block(e, &x, weights, shared, blocks, segments, tile);

  griddep_launch();
  if (threadIdx.x == CONSUMERS) block.begin();
  if constexpr (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();

  if (block.warp >= CONSUMERS / 32) {
    if constexpr (MODE == FLOW)
      registers_lower<88>();
    else if constexpr (L::MANY_REGISTERS)
      registers_lower<40>();
    if (threadIdx.x == CONSUMERS) {
      block.produce();
    } else {
      griddep_wait();
      if constexpr (MODE == FLOW) block.store();
    }
    __syncwarp();
    if constexpr (L::SUMS_UP) {
      cluster_sync();
      if constexpr (!L::SENDS) cluster_arrive();
    }
  } else {
    if constexpr (MODE == FLOW)
      registers_raise<208>();
    else if constexpr (L::MANY_REGISTERS)
      registers_raise<232>();
    griddep_wait();
    if constexpr (L::SENDS)
      block.sum_and_send();
    else if constexpr (L::SUMS_UP)
      block.sum_up();
    else
      block.sum_visits();
  }

  if constexpr (L::SENDS) {  // who has all its parts has nothing more to come
  } else if constexpr (L::SUMS_UP)
    cluster_wait();  // nobody leaves while its shared memory is being read
  else if constexpr (CLUSTER > 1)
    cluster_sync();
}

}  // namespace rvllm::gemm
