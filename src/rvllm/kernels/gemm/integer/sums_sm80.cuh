// What the kernels of integer weights without wgmma multiply and add up with: mma.sync, a warp's 16 rows by TOKENS tokens.
#pragma once

#include "gemm/integer/formats.cuh"

namespace rvllm::gemm {

// Sums along K: of what is not scaled yet, of the segment, of all segments before it.
template <class T, int TOKENS, class F>
struct Sums {
  static constexpr int N = TOKENS / 8, BOX = TOKENS * TILE * 2;  // bytes of 64 columns of x
  float total[N][4], sum[N][4] = {}, acc[N][4] = {};

  // One chunk of K. x, chunk: in shared memory; row: the thread's first. What has one scale for all of it is yet to be scaled.
  __device__ __forceinline__ void multiply(u32 x, u32 chunk, int thread, int row) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
      u32 a[4][4];
      F::template decode<T>(a, chunk, u, thread, row);
#pragma unroll
      for (int step = 0; step < 4; step++) {
        multiply_step<T>(acc, a[step], x + u * BOX, step, thread % 32);
        if constexpr (F::INTEGERS && F::RUNS > 1) {
          if (step % F::STEPS == F::STEPS - 1) scale_by_run(F::run_at(chunk, u, step) + 4 * row);
        }
      }
    }
  }

  // Scales what has been multiplied; scales of the thread's two rows.
  __device__ __forceinline__ void scale(const float (&by)[2]) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum[j][i] = fmaf(by[i / 2], acc[j][i], sum[j][i]);
        acc[j][i] = 0.f;
      }
  }
  __device__ __forceinline__ void scale_by_run(u32 run) {
    const float by[2] = {low_half(shared_word(run)), low_half(shared_word(run + 32))};
    scale(by);
  }

  // Ends a segment; worth(sum, i / 2): what the sum of one of the thread's two rows counts.
  template <class Worth>
  __device__ __forceinline__ void end_segment(bool first, Worth worth) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float v = worth(F::INTEGERS ? sum[j][i] : acc[j][i], i / 2);
        total[j][i] = first ? v : total[j][i] + v;
        sum[j][i] = acc[j][i] = 0.f;
      }
  }
};

}  // namespace rvllm::gemm
