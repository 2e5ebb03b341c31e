// Matrix kernel for GPUs without wgmma (sm_80 and later): mma.sync fed by cp.async, the same packed weights.
// A block of 4 warps sums 64 rows of W by TOKENS tokens over all of K; each warp has 16 of the rows.
// grid (row tiles * G, token tiles / G): G neighbouring blocks take the same rows and other tokens, so that weights come
// from memory for one of them and from L2 for the others, and G token tiles of x stay there.
#include "gemm/gemm.cuh"

namespace rvllm::gemm {

inline constexpr int THREADS = 128, STAGES = 4;

// x: [tokens, k] row-major with `x_pitch` elements from row to row, k and x_pitch multiples of 8, 16-byte
// aligned. The rest as in gemm/gemm_sm90.cu.
template <class T, int TOKENS>
__global__ void __launch_bounds__(THREADS)
    gemm(const T* __restrict__ x, const u8* __restrict__ weights, void* out, const void* bias, const void* residual,
         int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int blocks, int segments, int k,
         int x_pitch) {
  using namespace ptx;
  constexpr int X_BYTES = TOKENS * TILE * 2, STAGE = TILE_BYTES + X_BYTES, PITCH = TILE + 4;
  static_assert(TOKENS * PITCH * 4 <= STAGES * STAGE, "the staged sums reuse the pipeline");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row_tiles = (rows + TILE - 1) / TILE, together = gridDim.x / row_tiles, row_tile = blockIdx.x / together;
  const int token0 = (blockIdx.y * together + blockIdx.x % together) * TOKENS;
  const u8* tile = weights + static_cast<u64>(row_tile) * blocks * TILE_BYTES;
  Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};
  e.best_only = e.asks_for_best();

  griddep_launch();
  griddep_wait();
  if (token0 >= tokens) return;
  const auto load = [&](int block) {
    if (block < blocks) {
      const u32 at = base + block % STAGES * STAGE;
      for (int i = thread * 16; i < TILE_BYTES; i += THREADS * 16)
        cp_async16(at + i, tile + static_cast<u64>(block) * TILE_BYTES + i);
      for (int i = thread; i < TOKENS * 8; i += THREADS) {
        const int row = i / 8, chunk = i % 8, column = block * TILE + chunk * 8;
        const bool inside = token0 + row < tokens && column < k;
        const T* from = inside ? x + static_cast<size_t>(token0 + row) * x_pitch + column : x;
        cp_async16(at + TILE_BYTES + row * 128 + (chunk ^ row % 8) * 16, from, inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);

  float sum[TOKENS / 8][4], acc[TOKENS / 8][4] = {};
  int segment = 0, end = segment_start(blocks, segments, 1);
  for (int block = 0; block < blocks; block++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(block + STAGES - 1);
    const u32 a_base = base + block % STAGES * STAGE, b_base = a_base + TILE_BYTES;
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
      u32 a[4];
      const int row = warp * 16 + lane % 16, chunk = 2 * step + lane / 16;
      ldmatrix_x4(a, a_base + row * 128 + (chunk ^ row % 8) * 16);
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j += 2) {
        u32 b[4];
        const int token = 8 * j + lane / 16 * 8 + lane % 8, half = 2 * step + lane / 8 % 2;
        ldmatrix_x4(b, b_base + token * 128 + (half ^ token % 8) * 16);
        mma_16816(acc[j], a, {b[0], b[1]}, T());
        mma_16816(acc[j + 1], a, {b[2], b[3]}, T());
      }
    }
    if (block + 1 == end) {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sum[j][i] = segment == 0 ? acc[j][i] : sum[j][i] + acc[j][i];
          acc[j][i] = 0.f;
        }
      segment++;
      end = segment_start(blocks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
  const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) staging[(8 * j + column + i % 2) * PITCH + row + i / 2 * 8] = sum[j][i];
  __syncthreads();
  const int count = min(TOKENS, tokens - token0);
  if (e.best_only) {
    store_bests<T>(e, staging, PITCH, token0, row_tile * TILE, count, thread, THREADS);
    return;
  }
  finish_tile<T, TILE, 2>(e, token0, row_tile * TILE, 0, count * items_per_token<TILE>(kind), thread, THREADS,
                       [&](int token, int r, float(&q)[4]) {
                         const float4 f = *reinterpret_cast<const float4*>(staging + token * PITCH + r);
                         q[0] = f.x, q[1] = f.y, q[2] = f.z, q[3] = f.w;
                       });
}

}  // namespace rvllm::gemm
