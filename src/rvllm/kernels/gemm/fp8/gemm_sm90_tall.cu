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
#include "gemm/fp8/tall_mainloop.cuh"

namespace rvllm::fp8 {

using namespace gemm;

template <int ROWS, bool SUM>
using Tall = TallLayout<ROWS, SUM, 2, (ROWS > 128 ? HALVES : TURNS), false>;

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

// x: tensor map of e4m3 [>= tokens, pitch] in boxes of 128 bytes x 128 rows, 128-byte swizzle. The other parameters are those of
// gemm in gemm_sm90.cu; x_rows and x_width are not looked at.
template <class T, int ROWS, bool SUM>
__global__ void __launch_bounds__(Tall<ROWS, SUM>::THREADS, 1)
    gemm_tall(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
              const float* __restrict__ row_scales, const void* x_rows, const float* x_scales, int x_width, int x_pitch,
              void* out, const void* bias, const void* residual, int kind, int tokens, int rows, int pitch, float scale,
              float soft_cap, int blocks, int segments) {
  using L = Tall<ROWS, SUM>;
  using namespace ptx;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const Ring ring = tall_ring<L>(base);
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  griddep_launch();
  if (threadIdx.x == L::CONSUMERS) {
    tensor_map_prefetch(&x);
    begin_ring(ring, L::CONSUMERS / 32 * L::SHARERS);
  }
  cluster_sync();
  PairScheduler<L::ROW_TILES> scheduler(rows, tokens, L::TOKENS);
  if (warp >= L::CONSUMERS / 32) {
    registers_lower<40>();
    if (threadIdx.x == L::CONSUMERS)
      produce<L>(x, weights, block_scales, x_scales, x_pitch, scheduler, ring, base + L::SCALES_AT, rows, blocks, 0, blocks);
    __syncwarp();
  } else {
    registers_raise<232>();
    griddep_wait();
    u8* const room = shared + L::ROOM_AT + warp * L::ROOM;
    float* const totals = reinterpret_cast<float*>(room) + lane;
    TallConsumer<L> c{block_scales, row_scales, (rows + TILE - 1) / TILE, warp / 4, warp, lane, base + L::SCALES_AT, ring, {}};
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
