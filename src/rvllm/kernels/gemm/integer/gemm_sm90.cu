// Products with integer weights on Hopper: y = x W^T as in gemm/gemm_sm90.cu, but what streams through shared memory
// are levels; each warpgroup turns its 64 rows of them into the register operand of wgmma.
//
//   SPLIT  the blocks of a cluster sum the segments of K of one tile, each one or several, which are added through
//          distributed shared memory. grid (blocks of a cluster, token tiles, row pairs).
//   WALK   resident blocks visit tiles and sum all segments; the running total lies in shared memory.
//
// One arithmetic for all of them: the groups' (or steps') sums are added in ascending order within a segment, the
// segments' sums in ascending order.
#include "gemm/cluster_fetch.cuh"
#include "gemm/integer/formats.cuh"
#include "gemm/integer/tiles.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/fill_ring.cuh"
#include "ptx/wgmma_rs.cuh"

namespace rvllm::gemm {

enum Mode { SPLIT, WALK };
inline constexpr int TURN = 4;  // named barriers: from here on
inline constexpr int CONSUMERS = 256;

template <int TOKENS, class F, Mode MODE>
struct Layout {
  static constexpr bool WARPS = TOKENS <= 32;  // mma.sync, warp by warp: wgmma is too slow to answer
  static constexpr bool TURNS = TOKENS >= 96;   // the warpgroups multiply in turns
  static constexpr bool MANY_REGISTERS = TOKENS >= 96;
  static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : 32);
  static constexpr int DEPTH = TOKENS <= 32 ? 2 : 1;  // chunks of a stage
  static constexpr int WEIGHTS = (2 * DEPTH * F::CHUNK + 1023) / 1024 * 1024, X = DEPTH * TOKENS * CHUNK_K * 2;
  static constexpr int STAGE = WEIGHTS + X;
  static constexpr int CHUNK = TOKENS % 64 == 0 ? 64 : TOKENS < 32 ? TOKENS : 32;  // tokens staged at a time
  static constexpr int STAGE_PITCH = (TILE + 8) * 2;  // bytes; spreads stores over all banks
  static constexpr int SPLIT_PITCH = 2 * TILE + 4;    // floats, likewise
  static constexpr int SUMS = (CHUNK < 32 ? CHUNK : 32) * (TILE + 4) * 4;  // float32 on their way to logits
  static constexpr int PER_GROUP = CHUNK * STAGE_PITCH > SUMS ? CHUNK * STAGE_PITCH : SUMS;
  static constexpr int STAGING = MODE == SPLIT ? 0 : 2 * PER_GROUP;
  // Of a product with several segments, in the place of what is staged later.
  static constexpr int TOTALS = MODE == SPLIT ? 0 : TOKENS * 2 * TILE * 4 > STAGING ? TOKENS * 2 * TILE * 4 : STAGING;
  static constexpr int PARTIAL = TOKENS * SPLIT_PITCH * 4;
  static constexpr int BARRIERS = 256;
};

// A thread block's share of the product: what it was given, and its roles. The roles are functions; all are inlined.
template <class T, int TOKENS, class F, Mode MODE>
struct Block {
  using L = Layout<TOKENS, F, MODE>;
  static constexpr int REGS = TOKENS / 2, D = L::DEPTH;
  using Sums = float[REGS];

  Epilogue e;
  const TensorMap* x;
  const u8* weights;
  u8* shared;
  int chunks, segments;  // of K
  int parts;             // segments that are summed here
  bool totals;           // running totals lie in shared memory
  Ring ring;
  u8* staged;  // behind the stages
  int tiles, warp, lane, group, thread, row;
  Tiles<TOKENS> order;
  bool once = true;

  __device__ __forceinline__ Block(const Epilogue& e, const TensorMap* x, const u8* weights, u8* shared, int chunks, int segments)
      : e(e), x(x), weights(weights), shared(shared), chunks(chunks), segments(segments),
        parts(MODE == SPLIT ? segments / static_cast<int>(gridDim.x) : segments), totals(MODE == WALK && segments > 1),
        tiles((e.rows + TILE - 1) / TILE), order(tiles, e.tokens) {
    // SPLIT: the sums of all segments but the last lie behind the stages, the last one's in their place.
    const int behind = (MODE == SPLIT ? (parts - 1) * L::PARTIAL : totals ? L::TOTALS : L::STAGING) + L::BARRIERS;
    const int stages = min((ptx::dynamic_smem_bytes() - behind) / L::STAGE, L::BARRIERS / 16);
    const u32 base = ptx::smem(shared);
    ring = {stages, base, base + L::WEIGHTS, L::STAGE, L::STAGE, base + stages * L::STAGE + behind - L::BARRIERS};
    staged = shared + stages * L::STAGE;
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    group = warp / 4, thread = threadIdx.x % 128;
    row = thread / 32 * 16 + lane / 4;  // of a warpgroup's 64
  }

  // One thread, before the others go on.
  __device__ __forceinline__ void begin() const {
    using namespace ptx;
    tensor_map_prefetch(x);
    begin_ring(ring, CONSUMERS / 32);
  }

  __device__ __forceinline__ bool next(WorkTile& v) {
    if constexpr (MODE == WALK) return order.next(v);
    const bool first = once;
    once = false;
    v = {static_cast<int>(blockIdx.z) * 2, 2, static_cast<int>(blockIdx.y) * TOKENS};
    return first;
  }

  // The chunk at which this block's segment s begins.
  __device__ __forceinline__ int bound(int s) const {
    return segment_start(chunks, segments, (MODE == SPLIT ? blockIdx.x * parts : 0) + s);
  }

  __device__ __forceinline__ void load_weights(const WorkTile& v, int k, int end, int stage, u64 hint) const {
    using namespace ptx;
    const u32 bar = ring.full(stage), dst = ring.weights + stage * L::STAGE, bytes = (end - k) * F::CHUNK;
    mbar_arrive_expect(bar, v.count * bytes + (end - k) * TOKENS * CHUNK_K * 2);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (i < v.count) {
        const u64 tile = min(v.tile + i, tiles - 1);
        bulk_load(dst + i * D * F::CHUNK, weights + (tile * chunks + k) * F::CHUNK, bytes, bar, hint);
      }
  }

  // One thread fills the ring. A stage has up to D chunks, and none reaches over a segment's end.
  __device__ __forceinline__ void produce() {
    using namespace ptx;
    const u64 hint = order.again() ? EVICT_NORMAL : EVICT_FIRST;
    WorkTile v;
    bool more = next(v);
    // Weights first: they depend on no kernel before this one.
    int ahead = 0;
    if (more)
      for (int s = 0; s < parts && ahead < ring.stages; s++)
        for (int k = bound(s); k < bound(s + 1) && ahead < ring.stages; k += D, ahead++)
          load_weights(v, k, min(k + D, bound(s + 1)), ahead, hint);
    griddep_wait();
    while (more) {
      for (int s = 0; s < parts; s++)
        for (int k = bound(s); k < bound(s + 1); k += D) {
          const int end = min(k + D, bound(s + 1));
          if (ahead > 0) {
            ahead--;
          } else {
            mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
            load_weights(v, k, end, ring.stage, hint);
          }
          for (int i = 0; i < 2 * (end - k); i++)
            tensor_load_2d(ring.x_at() + i * TOKENS * TILE * 2, x, (2 * k + i) * TILE, v.token0, ring.full(ring.stage));
          ring.advance();
        }
      more = next(v);
    }
  }

  __device__ __forceinline__ void wait_stage() const { ptx::mbar_wait(ring.full(ring.stage), ring.phase); }
  __device__ __forceinline__ void release(int stage) const { gemm::release<1>(ring, stage, lane); }
  // The same where ordinary loads have read the stage last: once there are sums of all that they brought.
  __device__ __forceinline__ void release(int stage, const Sums& sum) const {
    gemm::release_read<1>(ring, stage, lane, __float_as_uint(sum[0]) | __float_as_uint(sum[2]));
  }
  __device__ __forceinline__ u32 weights_at(int place) const { return ring.weights_at() + (group * D + place) * F::CHUNK; }
  __device__ __forceinline__ u32 x_at(int place, int u) const { return ring.x_at() + (2 * place + u) * TOKENS * TILE * 2; }

  static __device__ __forceinline__ void clear(Sums& v) {
#pragma unroll
    for (int i = 0; i < REGS; i++) v[i] = 0.f;
  }
  static __device__ __forceinline__ void copy(Sums& to, const Sums& from) {
#pragma unroll
    for (int i = 0; i < REGS; i++) to[i] = from[i];
  }

  // Products of a unit's steps [from, to) by mma.sync, added to acc.
  __device__ __forceinline__ void multiply_now(Sums& acc, const u32 (&a)[4][4], u32 b, int from, int to) const {
    using namespace ptx;
#pragma unroll
    for (int j = from; j < to; j += 2)
#pragma unroll
      for (int n = 0; n < TOKENS / 8; n++) {
        u32 v[4];
        ldmatrix_x4(v, b + (8 * n + lane % 8) * 128 + (2 * j + lane / 8 ^ lane % 8) * 16);
        float(&d)[4] = reinterpret_cast<float(&)[4]>(acc[4 * n]);
        mma_16816(d, a[j], {v[0], v[1]}, T());
        mma_16816(d, a[j + 1], {v[2], v[3]}, T());
      }
  }

  // The same by wgmma, begun and not awaited; kept says that they are added to what acc has.
  static __device__ __forceinline__ void multiply(Sums& acc, const u32 (&a)[4][4], u32 b, int from, int to, bool kept) {
    using namespace ptx;
    wgmma_pin(acc);
    wgmma_fence();
#pragma unroll
    for (int j = from; j < to; j++) wgmma_rs<TOKENS, T, 0>(acc, a[j], wgmma_operand(b + 32 * j), j > from || kept);
    wgmma_commit();
    wgmma_pin(acc);
  }
  static __device__ __forceinline__ void wait_products(Sums& acc) {
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(acc);
  }

  // sum += scale * acc, a row at a time; the scales are at `run`.
  static __device__ __forceinline__ void promote(Sums& sum, const Sums& acc, u32 run) {
    using namespace ptx;
    const float low = low_half(shared_word(run)), high = low_half(shared_word(run + 32));
#pragma unroll
    for (int i = 0; i < REGS; i++) sum[i] = fmaf(i % 4 < 2 ? low : high, acc[i], sum[i]);
  }

  // The three ways of summing chunks [first, last), with the same bits. By warps: what one waits for, others hide.
  __device__ __forceinline__ void segment_by_warps(Sums& sum, int first, int last) {
    Sums acc;
    clear(sum);
    clear(acc);
    for (int k = first; k < last; k += D) {
      wait_stage();
#pragma unroll
      for (int place = 0; place < D; place++)
        if (k + place < last) chunk_by_warp(sum, acc, place);
      __syncwarp();
      release(ring.stage, F::INTEGERS ? sum : acc);
      ring.advance();
    }
    if constexpr (!F::INTEGERS) copy(sum, acc);
  }

  __device__ __forceinline__ void chunk_by_warp(Sums& sum, Sums& acc, int place) const {
    const u32 here = weights_at(place);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      u32 a[4][4];
      F::template decode<T>(a, here, u, thread, row);
      if constexpr (F::INTEGERS && F::RUNS > 1) {
#pragma unroll
        for (int j = 0; j < 4; j += F::STEPS) {
          multiply_now(acc, a, x_at(place, u), j, j + F::STEPS);
          promote(sum, acc, F::run_at(here, u, j) + 4 * row);
          clear(acc);
        }
      } else {
        multiply_now(acc, a, x_at(place, u), 0, 4);
      }
    }
    if constexpr (F::INTEGERS && F::RUNS == 1) {
      promote(sum, acc, here + 4 * row);
      clear(acc);
    }
  }

  // The warpgroup's turn begins, or becomes the other's.
  __device__ __forceinline__ void turn() const { ptx::bar_sync(TURN + group, CONSUMERS); }
  __device__ __forceinline__ void pass_turn() const { ptx::bar_arrive(TURN + (group ^ 1), CONSUMERS); }

  // In turns: while one warpgroup's products run, the other promotes its sums and decodes its next chunk.
  __device__ __forceinline__ void segment_in_turns(Sums& sum, int first, int last) {
    Sums acc;
    u32 even[4][4], odd[4][4];
    if constexpr (F::INTEGERS) clear(sum);
    for (int k = first; k < last; k++) {
      wait_stage();
      const u32 here = weights_at(0);
      F::template decode<T>(even, here, 0, thread, row);
      F::template decode<T>(odd, here, 1, thread, row);
      turn();
      if constexpr (F::INTEGERS && F::RUNS > 1) {
#pragma unroll
        for (int u = 0; u < 2; u++)
#pragma unroll
          for (int j = 0; j < 4; j += F::STEPS) {
            multiply(acc, u ? odd : even, x_at(0, u), j, j + F::STEPS, false);
            if (u == 1 && j + F::STEPS == 4) pass_turn();
            wait_products(acc);
            promote(sum, acc, F::run_at(here, u, j) + 4 * row);
          }
      } else {
        multiply(acc, even, x_at(0, 0), 0, 4, !F::INTEGERS && k > first);
        multiply(acc, odd, x_at(0, 1), 0, 4, true);
        pass_turn();
        wait_products(acc);
        if constexpr (F::INTEGERS) promote(sum, acc, here + 4 * row);
      }
      release(ring.stage, F::INTEGERS ? sum : acc);
      ring.advance();
    }
    if constexpr (!F::INTEGERS) copy(sum, acc);
  }

  // Overlapped: while the tensor cores multiply one unit the next is decoded.
  __device__ __forceinline__ void segment_overlapped(Sums& sum, int first, int last) {
    using namespace ptx;
    Sums acc;
    u32 even[4][4], odd[4][4];
    int k = first, at = 0;  // the chunk, and its place within its stage
    wait_stage();
    F::template decode<T>(even, weights_at(0), 0, thread, row);
    if constexpr (F::INTEGERS) clear(sum);
    int reading = -1;  // the stage that products in flight read last
    while (true) {
      const u32 here = weights_at(at);
      if constexpr (F::INTEGERS && F::RUNS > 1) {
        multiply_groups(sum, acc, even, here, at, 0);
        F::template decode<T>(odd, here, 1, thread, row);
        multiply_groups(sum, acc, odd, here, at, 1);
      } else {
        multiply(acc, even, x_at(at, 0), 0, 4, !F::INTEGERS && k > first);
        if constexpr (!F::INTEGERS) {
          wgmma_wait<1>();
          if (reading >= 0) release(reading);
        }
        F::template decode<T>(odd, here, 1, thread, row);
        multiply(acc, odd, x_at(at, 1), 0, 4, true);
      }
      const bool leave = ++at == D || k + 1 == last, more = ++k < last;
      reading = leave ? ring.stage : -1;
      if (leave) {
        at = 0;
        ring.advance();
      }
      if (more) {
        if (leave) wait_stage();
        if constexpr (F::RUNS == 1 || !F::INTEGERS) wgmma_wait<1>();
        F::template decode<T>(even, weights_at(at), 0, thread, row);
      }
      if constexpr (F::INTEGERS) {
        if constexpr (F::RUNS == 1) {
          wait_products(acc);
          promote(sum, acc, here + 4 * row);
        }
        if (leave) release(reading, sum);
      }
      if (!more) break;
    }
    if constexpr (!F::INTEGERS) {
      wait_products(acc);
      if (reading >= 0) release(reading);
      copy(sum, acc);
    }
  }

  // The products of a unit, group by group.
  __device__ __forceinline__ void multiply_groups(Sums& sum, Sums& acc, const u32 (&a)[4][4], u32 here, int at, int u) const {
#pragma unroll
    for (int j = 0; j < 4; j += F::STEPS) {
      multiply(acc, a, x_at(at, u), j, j + F::STEPS, false);
      wait_products(acc);
      promote(sum, acc, F::run_at(here, u, j) + 4 * row);
    }
  }

  __device__ __forceinline__ void segment(Sums& sum, int first, int last) {
    if constexpr (L::WARPS)
      segment_by_warps(sum, first, last);
    else if constexpr (L::TURNS)
      segment_in_turns(sum, first, last);
    else
      segment_overlapped(sum, first, last);
  }

  // Turns are taken as often as they are passed on: the first is the first warpgroup's, as is the last.
  __device__ __forceinline__ void begin_turns() const {
    if (L::TURNS && group == 1) ptx::bar_arrive(TURN, CONSUMERS);
  }
  __device__ __forceinline__ void end_turns() const {
    if (L::TURNS && group == 0) ptx::bar_sync(TURN, CONSUMERS);
  }

  // SPLIT: sums this block's segments and leaves them in shared memory for the cluster.
  __device__ __forceinline__ void sum_parts() {
    WorkTile v;
    next(v);
    for (int s = 0; s < parts; s++) {
      Sums sum;
      segment(sum, bound(s), bound(s + 1));
      if (s + 1 == parts) {
        end_turns();
        ptx::bar_sync(1, CONSUMERS);  // both warpgroups have read their last stage before partial sums overwrite it
      }
      float* partial = reinterpret_cast<float*>(s + 1 == parts ? shared : staged + s * L::PARTIAL);
      const int column = lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          partial[(8 * j + column + i % 2) * L::SPLIT_PITCH + group * TILE + row + i / 2 * 8] = sum[4 * j + i];
    }
  }

  // SPLIT: every block of the cluster adds up, in ascending order of segments, its share of the tile. Where registers
  // are dealt out, consumers do it among themselves: behind both branches there are as few as the producer has.
  __device__ __forceinline__ void add_up() const {
    using namespace ptx;
    const int token0 = blockIdx.y * TOKENS, row0 = blockIdx.z * 2 * TILE, mine = blockIdx.x;
    const int items = min(TOKENS, e.tokens - token0) * items_per_token<2 * TILE>(e.kind);
    const auto load = [&](int token, int r, float(&q)[4]) {
      const u32 from = (token * L::SPLIT_PITCH + r) * 4;
      const auto at = [&](int s) {
        const int p = s % parts;
        return cluster_map((p + 1 == parts ? ring.weights : smem(staged) + p * L::PARTIAL) + from, s / parts);
      };
      fetch_sum<8>(segments, at, q);
    };
    finish_tile<T, 2 * TILE, 1>(e, token0, row0, items * mine / gridDim.x, items * (mine + 1) / gridDim.x, threadIdx.x,
                                CONSUMERS, load);
  }

  // A visit that has no tile for this warpgroup: it keeps in step with the pipeline.
  __device__ __forceinline__ void pass() {
    for (int s = 0; s < parts; s++)
      for (int k = bound(s); k < bound(s + 1); k += D) {
        wait_stage();
        if constexpr (L::TURNS) turn(), pass_turn();
        release(ring.stage);
        ring.advance();
      }
  }

  // WALK: tile after tile, all its segments.
  __device__ __forceinline__ void sum_visits() {
    u8* const mine = staged + group * (totals ? L::TOTALS / 2 : L::PER_GROUP);
    float* const total = reinterpret_cast<float*>(mine) + thread;
    WorkTile v;
    while (next(v)) {
      if (group >= v.count) {
        pass();
        continue;
      }
      Sums sum;
      for (int s = 0; s < parts; s++) {
        segment(sum, bound(s), bound(s + 1));
        if (s > 0) {
#pragma unroll
          for (int i = 0; i < REGS; i++) sum[i] = total[i * 128] + sum[i];
        }
        if (s + 1 < parts) {
          if (s == 0) ptx::bar_sync(1 + group, 128);  // the tile before has left
#pragma unroll
          for (int i = 0; i < REGS; i++) total[i * 128] = sum[i];
        }
      }
      finish_accumulators<T, TOKENS, L::CHUNK, L::STAGE_PITCH>(e, sum, mine, 1 + group, thread, (v.tile + group) * TILE,
                                                               v.token0);
    }
    end_turns();
  }
};

// x: tensor map of [>= tokens, K] in boxes of 64 x TOKENS, 128-byte swizzle. weights: see formats.cuh. chunks:
// ceil(K / 128). The rest: see Epilogue. As many stages as the launch's shared memory holds.
template <class T, int TOKENS, class F, Mode MODE>
__global__ void __launch_bounds__((Layout<TOKENS, F, MODE>::THREADS), TOKENS <= 32 ? 2 : 1)
    gemm(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, void* out, const void* bias,
         const void* residual, int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int chunks,
         int segments) {
  using L = Layout<TOKENS, F, MODE>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  Block<T, TOKENS, F, MODE> block(e, &x, weights, shared, chunks, segments);

  griddep_launch();
  if (threadIdx.x == CONSUMERS) block.begin();
  __syncthreads();

  if (block.warp >= CONSUMERS / 32) {
    if constexpr (L::MANY_REGISTERS) registers_lower<40>();
    if (threadIdx.x == CONSUMERS)
      block.produce();
    else
      griddep_wait();
    __syncwarp();
    if constexpr (MODE == SPLIT && L::MANY_REGISTERS) cluster_sync(), cluster_sync();  // the consumers' two
  } else {
    if constexpr (L::MANY_REGISTERS) registers_raise<232>();
    block.begin_turns();
    griddep_wait();
    if constexpr (MODE == WALK) {
      block.sum_visits();
    } else {
      block.sum_parts();
      if constexpr (L::MANY_REGISTERS) {
        cluster_sync();
        block.add_up();
        cluster_sync();
      }
    }
  }

  if constexpr (MODE == SPLIT && !L::MANY_REGISTERS) {
    cluster_sync();
    if (block.warp < CONSUMERS / 32) block.add_up();
    cluster_sync();  // nobody leaves while its shared memory is being read
  }
}

}  // namespace rvllm::gemm
