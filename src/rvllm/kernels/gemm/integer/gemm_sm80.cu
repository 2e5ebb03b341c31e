// Products with integer weights on GPUs without wgmma (sm_80 and later): mma.sync fed by cp.async, the same chunks.
// A block of 4 warps sums 64 rows of W by TOKENS tokens over all of K; each warp has 16 of the rows.
// grid (row tiles, token tiles).
#include "gemm/integer/formats.cuh"

namespace rvllm::gemm {

inline constexpr int THREADS = 128, STAGES = 3;

// x: [tokens, k] row-major with `x_pitch` elements from row to row, k and x_pitch multiples of 8, 16-byte
// aligned. The rest as in gemm/integer/gemm_sm90.cu, and the same order of sums.
template <class T, int TOKENS, class F>
__global__ void __launch_bounds__(THREADS)
    gemm(const T* __restrict__ x, const u8* __restrict__ weights, void* out, const void* bias, const void* residual,
         int kind, int tokens, int rows, int pitch, float scale, float soft_cap, int chunks, int segments, int k,
         int x_pitch) {
  using namespace ptx;
  constexpr int BOX = TOKENS * TILE * 2, STAGE = F::CHUNK + 2 * BOX, PITCH = TILE + 4;
  static_assert(TOKENS * PITCH * 4 <= STAGES * STAGE, "the staged sums reuse the pipeline");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = smem(shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int token0 = blockIdx.y * TOKENS, row = warp * 16 + lane / 4;
  const u8* const tile = weights + static_cast<u64>(blockIdx.x) * chunks * F::CHUNK;
  const Epilogue e{out, bias, residual, kind, tokens, rows, pitch, scale, soft_cap};

  griddep_launch();
  griddep_wait();
  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      const u32 at = base + chunk % STAGES * STAGE;
      for (int i = thread * 16; i < F::CHUNK; i += THREADS * 16)
        cp_async16(at + 2 * BOX + i, tile + static_cast<u64>(chunk) * F::CHUNK + i);
      for (int i = thread; i < TOKENS * 16; i += THREADS) {
        const int token = i / 16, piece = i % 16, column = chunk * CHUNK_K + piece * 8;
        const bool inside = token0 + token < tokens && column < k;
        const T* const from = inside ? x + static_cast<size_t>(token0 + token) * x_pitch + column : x;
        cp_async16(at + piece / 8 * BOX + token * 128 + (piece % 8 ^ token % 8) * 16, from, inside ? 16 : 0);
      }
    }
    cp_async_commit();  // also when empty, so that the count of groups stays in step
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);

  float total[TOKENS / 8][4], sum[TOKENS / 8][4], acc[TOKENS / 8][4];
  const auto clear = [](float(&v)[TOKENS / 8][4]) {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) v[j][i] = 0.f;
  };
  clear(sum);
  clear(acc);
  const auto promote = [&](u32 run) {
    const float scales[2] = {low_half(shared_word(run)), low_half(shared_word(run + 32))};
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[j][i] = fmaf(scales[i / 2], acc[j][i], sum[j][i]);
    clear(acc);
  };
  int segment = 0, end = segment_start(chunks, segments, 1);
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(chunk + STAGES - 1);
    const u32 b_base = base + chunk % STAGES * STAGE, here = b_base + 2 * BOX;
#pragma unroll
    for (int u = 0; u < 2; u++) {
      u32 a[4][4];
      F::template decode<T>(a, here, u, thread, row);
#pragma unroll
      for (int step = 0; step < 4; step++) {
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
          u32 b[4];
          const int token = 8 * j + lane / 16 * 8 + lane % 8, half = 2 * step + lane / 8 % 2;
          ldmatrix_x4(b, b_base + u * BOX + token * 128 + (half ^ token % 8) * 16);
          mma_16816(acc[j], a[step], {b[0], b[1]}, T());
          mma_16816(acc[j + 1], a[step], {b[2], b[3]}, T());
        }
        if constexpr (F::INTEGERS && F::RUNS > 1) {
          if (step % F::STEPS == F::STEPS - 1) promote(F::run_at(here, u, step) + 4 * row);
        }
      }
    }
    if constexpr (F::INTEGERS && F::RUNS == 1) promote(here + 4 * row);
    if (chunk + 1 == end) {
#pragma unroll
      for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float v = F::INTEGERS ? sum[j][i] : acc[j][i];
          total[j][i] = segment == 0 ? v : total[j][i] + v;
        }
      clear(sum);
      clear(acc);
      segment++;
      end = segment_start(chunks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
  const int column = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) staging[(8 * j + column + i % 2) * PITCH + row + i / 2 * 8] = total[j][i];
  __syncthreads();
  const int count = min(TOKENS, tokens - token0);
  finish_tile<T, TILE, 2>(e, token0, blockIdx.x * TILE, 0, count * items_per_token<TILE>(kind), thread, THREADS,
                          [&](int token, int r, float(&q)[4]) {
                            const float4 f = *reinterpret_cast<const float4*>(staging + token * PITCH + r);
                            q[0] = f.x, q[1] = f.y, q[2] = f.z, q[3] = f.w;
                          });
}

}  // namespace rvllm::gemm
