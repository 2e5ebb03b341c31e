// Products with integer weights on GPUs without wgmma (sm_80 and later): mma.sync fed by cp.async, the same chunks.
// A block of 4 warps sums 64 rows of W by TOKENS tokens over all of K; each warp has 16 of the rows.
// grid (row tiles, token tiles).
#include "gemm/integer/sums_sm80.cuh"

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

  Sums<T, TOKENS, F> sums;
  int segment = 0, end = segment_start(chunks, segments, 1);
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(chunk + STAGES - 1);
    const u32 b_base = base + chunk % STAGES * STAGE, here = b_base + 2 * BOX;
    sums.multiply(b_base, here, thread, row);
    if constexpr (F::INTEGERS && F::RUNS == 1) sums.scale_by_run(here + 4 * row);
    if (chunk + 1 == end) {
      sums.end_segment(segment == 0, [](float v, int) { return v; });
      segment++;
      end = segment_start(chunks, segments, segment + 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* staging = reinterpret_cast<float*>(shared);
  stage_sums<PITCH>(staging, sums.total, row, lane);
  __syncthreads();
  finish_staged<T, TILE, PITCH>(e, staging, token0, blockIdx.x * TILE, min(TOKENS, tokens - token0), thread, THREADS);
}

}  // namespace rvllm::gemm
