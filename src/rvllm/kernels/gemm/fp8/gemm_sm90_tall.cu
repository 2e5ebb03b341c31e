// Products of e4m3 weights and many tokens for Hopper. Unlike in gemm_sm90.cu, tokens are the 64-row side of wgmma and
// weights the wide one: a thread then needs the scales of two tokens for 128 of K, not of a quarter of the tile's tokens.
//
// A work tile is 128 tokens by ROWS of the weights. Of its two consumer warpgroups each has 64 tokens and two accumulators,
// halves of the rows or (128 rows) blocks of K in turns: while one is scaled and added, the tensor cores sum the other.
// SUM: for weights of several segments; what the segments before came to lies in shared memory.
//
// The two blocks of a cluster take the same rows and neighbouring tokens: each weight is loaded once and multicast.
// grid (clusters * 2, 1, 1), resident. The order of every sum is that of gemm_sm90.cu.
#include "gemm/epilogue_overlap.cuh"
#include "gemm/fp8/fp8.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/tile_scheduler.cuh"
#include "ptx/wgmma_fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;

template <int ROWS, bool SUM>
struct TallLayout {
  static constexpr int TOKENS = 128, CONSUMERS = 256, THREADS = CONSUMERS + 128, ROW_TILES = ROWS / TILE;
  static constexpr int WIDTH = ROWS > 128 ? ROWS / 2 : ROWS;  // of an accumulator
  static constexpr int WEIGHTS = ROW_TILES * TILE_BYTES, X = TOKENS * BLOCK_K;
  static constexpr int WEIGHT_SCALES = ROW_TILES * 32, SCALES = WEIGHT_SCALES + TOKENS * 4, STAGE = WEIGHTS + X + SCALES;
  static constexpr int STAGED = 16 * ROWS * 2;               // a warp's outputs on their way out
  static constexpr int TOTALS = SUM ? ROWS / 2 * 32 * 4 : 0;  // a warp's sums of the segments before
  static constexpr int ROOM = TOTALS > STAGED ? TOTALS : STAGED;
  static constexpr int BARRIERS = 128, LIMIT = 232448;
  static constexpr int STAGES = (LIMIT - BARRIERS - CONSUMERS / 32 * ROOM) / STAGE;
  static constexpr int BYTES = STAGES * STAGE + CONSUMERS / 32 * ROOM + BARRIERS;
  static_assert(STAGES >= 3 && STAGES * 16 <= BARRIERS && SCALES % 16 == 0);
};

// One thread: fills the ring. Weights first, which depend on no kernel before this one.
template <class L, class Scheduler>
__device__ __forceinline__ void produce(const TensorMap& x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
                                        const float* x_scales, int x_pitch, Scheduler scheduler, Ring ring, u32 scales, int rows,
                                        int blocks) {
  using namespace ptx;
  constexpr u16 BOTH = 3;
  const int rank = blockIdx.x % 2, tiles = (rows + TILE - 1) / TILE;
  const u64 hint = scheduler.pairs > 1 ? EVICT_NORMAL : EVICT_FIRST;
  const auto load_weights = [&](const WorkTile& t, int k, const Ring& at) {
    const auto source = [&](int i) { return weights + (static_cast<u64>(min(t.row_tile + i, tiles - 1)) * blocks + k) * TILE_BYTES; };
    const u32 bar = at.full(at.stage), dst = at.weights_at();
    const int scaled = block_scales ? min(L::ROW_TILES, tiles - t.row_tile) * 32 : 0;
    mbar_arrive_expect(bar, L::WEIGHTS + L::X + L::TOKENS * 4 + scaled);
    bulk_load_multicast(dst + rank * TILE_BYTES, source(rank), TILE_BYTES, bar, BOTH, hint);
    if constexpr (L::ROW_TILES == 3) {
      const int half = rank * (TILE_BYTES / 2);
      bulk_load_multicast(dst + 2 * TILE_BYTES + half, source(2) + half, TILE_BYTES / 2, bar, BOTH, hint);
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
  int ahead = more ? min(ring.stages, blocks) : 0;
  for (Ring r = ring; r.stage < ahead; r.stage++) load_weights(t, r.stage, r);
  griddep_wait();
  for (int k = 0; k < ahead; k++) {
    load_x(t, k, ring);
    ring.advance();
  }
  while (more) {
    for (int k = ahead; k < blocks; k++) {
      mbar_wait(ring.empty(ring.stage), ring.phase ^ 1);
      load_weights(t, k, ring);
      load_x(t, k, ring);
      ring.advance();
    }
    ahead = 0;
    more = scheduler.next(t);
  }
}

// What one warp does with its 16 tokens' sums of ROWS rows: rows row0 .. of tokens token0 .. token0 + 15. Outputs turn around
// in `staging` to leave in 16-byte pieces.
template <class T, int ROWS>
__device__ __forceinline__ void finish_tokens(const Epilogue& e, float (&sum)[ROWS / 2], u8* staging, int lane, int row0, int token0) {
  using Out = Pack<T, 8>;
  constexpr int PIECES = ROWS / 8, EACH = PIECES * 16 / 32;  // of a token; of a lane
  const int column = lane % 4 * 2, there = min(16, e.tokens - token0);
  if (there <= 0) return;
  if (e.kind == LOGITS) {  // the sums first, and then what becomes of them: in a loop, which keeps this short
    const auto to = [&](int i) { return static_cast<size_t>(token0 + lane / 4 + i / 2 % 2 * 8) * e.pitch + row0 + i / 4 * 8 + column + i % 2; };
    const auto exists = [&](int i) { return lane / 4 + i / 2 % 2 * 8 < there && row0 + i / 4 * 8 + column + i % 2 < e.rows; };
    float* const logits = static_cast<float*>(e.out);
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++)
      if (exists(i)) logits[to(i)] = sum[i];
#pragma unroll 4
    for (int i = 0; i < ROWS / 2; i++)
      if (exists(i)) logits[to(i)] = logit(logits[to(i)], bias_of<T>(e, row0 + i / 4 * 8 + column + i % 2), e.scale, e.soft_cap);
    return;
  }
  const bool aligned = (e.pitch & 7) == 0, quick = e.kind == STORE && aligned && row0 + ROWS <= e.rows && there == 16;
  const auto to = [&](int i) { return static_cast<size_t>(token0 + i / PIECES) * e.pitch + row0 + i % PIECES * 8; };
  // 64 rows lie together, as staged has them. Where there is no bias, zeros: -0 becomes 0 in every kernel.
  const auto at = [&](int token, int piece) { return piece / 8 * (16 * TILE * 2) + staged<false>(token, piece % 8); };
  const u32 out = ptx::smem(staging);
#pragma unroll
  for (int j = 0; j < ROWS / 8; j += 2) {
    float b[4];
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = bias_of<T>(e, row0 + 8 * j + i / 2 * 8 + column + i % 2);
    const auto pair = [&](int i, const float* bias) { return rounded_pair<T>(sum[i] + bias[0], sum[i + 1] + bias[1]); };
    ptx::stmatrix_x4(out + at(lane % 16, j + lane / 16), pair(4 * j, b), pair(4 * j + 2, b), pair(4 * j + 4, b + 2), pair(4 * j + 6, b + 2));
  }
  __syncwarp();
  const auto piece = [&](int token, int c) { return *reinterpret_cast<const Out*>(staging + at(token, c)); };
  if (quick) {
    Out held[EACH];
    if (e.residual) {
#pragma unroll
      for (int p = 0; p < EACH; p++) held[p] = *reinterpret_cast<const Out*>(static_cast<const T*>(e.residual) + to(lane + 32 * p));
    }
#pragma unroll
    for (int p = 0; p < EACH; p++) {
      const int i = lane + 32 * p;
      Out value = piece(i / PIECES, i % PIECES);
      if (e.residual) {
#pragma unroll
        for (int v = 0; v < 8; v++) value.v[v] = added<T>(held[p].v[v], value.v[v], e.scale);
      }
      *reinterpret_cast<Out*>(static_cast<T*>(e.out) + to(i)) = value;
    }
  } else if (gated(e.kind)) {
    const auto all = [&](auto act) {
#pragma unroll 1
      for (int i = lane; i < there * (PIECES / 2); i += 32) {
        const int token = i / (PIECES / 2), c = i % (PIECES / 2), n = row0 / 2 + c * 8;
        const Out gates = piece(token, 2 * c), ups = piece(token, 2 * c + 1);
        Out value;
        act(value, gates, ups);
        if (n < e.rows / 2) store(static_cast<T*>(e.out) + static_cast<size_t>(token0 + token) * e.pitch + n, value, 8, aligned);
      }
    };
    if (e.kind == GATED_SILU)
      all([](Out& value, const Out& gates, const Out& ups) {
#pragma unroll
        for (int v = 0; v < 8; v++)
          value.v[v] = rounded<T>(__fmul_rn(silu_quick(gemm::to_float(gates.v[v])), gemm::to_float(ups.v[v])));
      });
    else
      all([&](Out& value, const Out& gates, const Out& ups) { gate_all(value, gates, ups, e); });
  } else {
#pragma unroll 1
    for (int i = lane; i < there * PIECES; i += 32) {
      const int left = e.rows - (row0 + i % PIECES * 8);
      if (left <= 0) continue;
      Out value = piece(i / PIECES, i % PIECES);
      activate_all(value, e.kind);
      if (e.residual) add_residual(static_cast<const T*>(e.residual) + to(i), value, e.scale, left, aligned);
      store(static_cast<T*>(e.out) + to(i), value, left, aligned);
    }
  }
  __syncwarp();  // before anything else is written there
}

// A warpgroup's sums of one work tile after another.
template <class T, int ROWS, bool SUM>
struct Consumer {
  using L = TallLayout<ROWS, SUM>;
  static constexpr int REGS = L::WIDTH / 2;
  const float *block_scales, *row_scales;
  int tiles, group, warp, lane;
  u32 scales;
  Ring ring;
  float sum[ROWS / 2];

  __device__ __forceinline__ void release_stage(int stage) { release<2>(ring, stage, lane); }

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
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) sum[i] = 0.f;
    float first[REGS], second[REGS];
    if constexpr (L::WIDTH < ROWS) {  // the accumulators are halves of the rows
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
    } else {  // the accumulators are blocks of K in turns
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

// x: tensor map of e4m3 [>= tokens, pitch] in boxes of 128 bytes x 128 rows, 128-byte swizzle. The other parameters are those of
// gemm in gemm_sm90.cu; x_rows and x_width are not looked at.
template <class T, int ROWS, bool SUM>
__global__ void __launch_bounds__(TallLayout<ROWS, SUM>::THREADS, 1)
    gemm_tall(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
              const float* __restrict__ row_scales, const void* x_rows, const float* x_scales, int x_width, int x_pitch,
              void* out, const void* bias, const void* residual, int kind, int tokens, int rows, int pitch, float scale,
              float soft_cap, int blocks, int segments) {
  using L = TallLayout<ROWS, SUM>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  constexpr int X_AT = L::STAGES * L::WEIGHTS, ROOM_AT = X_AT + L::STAGES * L::X;
  constexpr int SCALES_AT = ROOM_AT + L::CONSUMERS / 32 * L::ROOM, BARRIERS_AT = SCALES_AT + L::STAGES * L::SCALES;
  const u32 base = smem(shared);
  const Ring ring{L::STAGES, base, base + X_AT, L::WEIGHTS, L::X, base + BARRIERS_AT};
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  griddep_launch();
  if (threadIdx.x == L::CONSUMERS) {
    tensor_map_prefetch(&x);
    for (int s = 0; s < L::STAGES; s++) {
      mbar_init(ring.full(s), 1);
      mbar_init(ring.empty(s), L::CONSUMERS / 32 * 2);
    }
    mbar_init_fence();
  }
  cluster_sync();
  PairScheduler<L::ROW_TILES> scheduler(rows, tokens, L::TOKENS);
  if (warp >= L::CONSUMERS / 32) {
    registers_lower<40>();
    if (threadIdx.x == L::CONSUMERS)
      produce<L>(x, weights, block_scales, x_scales, x_pitch, scheduler, ring, base + SCALES_AT, rows, blocks);
    __syncwarp();
  } else {
    registers_raise<232>();
    griddep_wait();
    u8* const room = shared + ROOM_AT + warp * L::ROOM;
    float* const totals = reinterpret_cast<float*>(room) + lane;
    Consumer<T, ROWS, SUM> c{block_scales, row_scales, (rows + TILE - 1) / TILE, warp / 4, warp, lane, base + SCALES_AT, ring, {}};
    WorkTile t;
    while (scheduler.next(t)) {
      if constexpr (SUM) {
        for (int s = 0; s < segments; s++) {
          c.segment(segment_start(blocks, segments, s + 1) - segment_start(blocks, segments, s), t.row_tile);
          if (s > 0) {
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++) c.sum[i] = totals[i * 32] + c.sum[i];
          }
          if (s + 1 < segments) {
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++) totals[i * 32] = c.sum[i];
          }
        }
      } else {
        c.segment(blocks, t.row_tile);
      }
      finish_tokens<T, ROWS>(e, c.sum, room, lane, t.row_tile * TILE, t.token0 + warp * 16);
    }
  }
  cluster_sync();  // nobody leaves while the other block's loads or arrivals may still reach it
}

}  // namespace rvllm::fp8
