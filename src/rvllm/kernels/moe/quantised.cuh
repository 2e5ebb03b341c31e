// How experts' weights that keep their format are read: the formats of gemm/integer/formats.cuh, and E4M3.
#pragma once

#include "gemm/fp8/widened.cuh"
#include "gemm/integer/formats.cuh"
#include "moe/moe.cuh"

namespace rvllm::experts {

using namespace gemm;

// Two bytes of shared memory.
__device__ __forceinline__ u32 shared_half(u32 at) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}

// E4M3 in tiles of 64 x 128 (see gemm/fp8/fp8.cuh) with what the formats of gemm/integer/formats.cuh have.
struct E4m3 {
  static constexpr bool INTEGERS = true;  // sums of 128 along K are scaled, by numbers that lie behind all tiles
  static constexpr int RUNS = 1, STEPS = 4, CHUNK = TILE_BYTES;

  static __device__ __forceinline__ u32 run_at(u32 at, int, int) { return at; }

  template <class T>
  static __device__ __forceinline__ void decode(u32 (&a)[4][4], u32 at, int u, int thread, int row) {
    const u32 from = at + row * 128 + thread % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 here = from + ((4 * u + j) ^ row % 8) * 16;
#pragma unroll
      for (int i = 0; i < 4; i++) a[j][i] = fp8::widened_pair<T>(shared_half(here + i % 2 * 1024 + i / 2 * 8));
    }
  }
};

template <class F>
inline constexpr bool IS_E4M3 = false;
template <>
constexpr bool IS_E4M3<E4m3> = true;

// Scales of E4M3 matrices.
enum Scales : int { NO_SCALES = 0, ROW_SCALES = 1, BLOCK_SCALES = 2 };

}  // namespace rvllm::experts
