// E4M3 weights on GPUs without FP8 tensor cores that we use (sm_80 and later): each number becomes one of the activations'
// 16-bit type, which holds it exactly, on its way to mma.sync; activations stay as they are. Sums of 128 along K are
// scaled and added up in ascending order. A block of 4 warps sums 64 rows of W by TOKENS tokens over all of K.
// grid (row tiles, token tiles).
#include "gemm/fp8/widened.cuh"

namespace rvllm::fp8 {

using namespace gemm;
inline constexpr int THREADS = 128, STAGES = 4;

// x: [tokens, k] row-major with `x_pitch` elements from row to row, k and x_pitch multiples of 8, 16-byte aligned.
// weights, block_scales (or null), row_scales (or null): see fp8.cuh. blocks: ceil(K / 128). The rest: see Epilogue.
template <class T, int TOKENS>
__global__ void __launch_bounds__(THREADS)
    gemm_widened(const T* __restrict__ x, const u8* __restrict__ weights, const float* __restrict__ block_scales,
                 const float* __restrict__ row_scales, void* out, const void* bias, const void* residual, int kind,
                 int tokens, int rows, int pitch, float scale, float soft_cap, int blocks, int segments, int k, int x_pitch) {
  using namespace ptx;
  constexpr int X_BYTES = TOKENS * BLOCK_K * 2, STAGE = TILE_BYTES + X_BYTES, PITCH = TILE + 4;
  static_assert(TOKENS * PITCH * 4 <= STAGES * STAGE, "the staged sums reuse the pipeline");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int token0 = blockIdx.y * TOKENS, tiles = (rows + TILE - 1) / TILE;
  const u8* tile = weights + static_cast<u64>(blockIdx.x) * blocks * TILE_BYTES;
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};

  griddep_launch();
  griddep_wait();
  const auto load = [&](int block) {
    if (block < blocks) {
      const u32 at = base + block % STAGES * STAGE;
      for (int i = thread * 16; i < TILE_BYTES; i += THREADS * 16)
        cp_async16(at + i, tile + static_cast<u64>(block) * TILE_BYTES + i);
      for (int i = thread; i < TOKENS * 16; i += THREADS) {  // two halves of 64 columns, as 16-bit tiles lie
        const int row = i / 16, half = i % 16 / 8, chunk = i % 8, column = block * BLOCK_K + half * TILE + chunk * 8;
        const bool inside = token0 + row < tokens && column < k;
        const T* from = inside ? x + static_cast<size_t>(token0 + row) * x_pitch + column : x;
        cp_async16(at + TILE_BYTES + half * (TOKENS * 128) + row * 128 + (chunk ^ row % 8) * 16, from, inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);

  const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
  float by_row[2] = {1.f, 1.f};
  if (row_scales) by_row[0] = row_scales[blockIdx.x * TILE + row], by_row[1] = row_scales[blockIdx.x * TILE + row + 8];
  float total[TOKENS / 8][4] = {}, sum[TOKENS / 8][4] = {};
  int segment = 0, end = segment_start(blocks, segments, 1);
  for (int block = 0; block < blocks; block++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(block + STAGES - 1);
    const int stage = block % STAGES * STAGE;
    const u32 b_base = base + stage + TILE_BYTES;
    float acc[TOKENS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; step++) {
      const auto pair = [&](int r, int c) {
        const u8* at = shared + stage + r * 128 + (step ^ r % 8) * 16 + c;
        return widened_pair<T>(*reinterpret_cast<const u16*>(at));
      };
      const u32 a[4] = {pair(row, column), pair(row + 8, column), pair(row, column + 8), pair(row + 8, column + 8)};
      multiply_step<T>(acc, a, b_base + step / 4 * (TOKENS * 128), step % 4, lane);
    }
    float by_block[2] = {1.f, 1.f};
    if (block_scales) {
      const float* at = block_scales + (static_cast<size_t>(block) * tiles + blockIdx.x) * 8 + warp * 2;
      by_block[0] = at[0], by_block[1] = at[1];
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[j][i] = fmaf(acc[j][i], by_block[i / 2], sum[j][i]);
    if (block + 1 == end) {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float v = __fmul_rn(sum[j][i], by_row[i / 2]);
          total[j][i] = segment == 0 ? v : total[j][i] + v;
          sum[j][i] = 0.f;
        }
      segment++;
      end = segment_start(blocks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
  stage_sums<PITCH>(staging, total, row, lane);
  __syncthreads();
  finish_staged<T, TILE, PITCH>(e, staging, token0, blockIdx.x * TILE, min(TOKENS, tokens - token0), thread, THREADS);
}

}  // namespace rvllm::fp8
