// How experts' weights that keep their format are read: the formats of gemm/integer/formats.cuh, and E4M3.
#pragma once

#include "gemm/fp8/widened.cuh"
#include "gemm/integer/formats.cuh"
#include "moe/moe.cuh"

namespace rvllm::experts {

using namespace gemm;

// E4M3 in tiles of 64 x 128 (see gemm/fp8/fp8.cuh) with what the formats of gemm/integer/formats.cuh have.
struct E4m3 {
  static constexpr bool INTEGERS = true;  // sums of 128 along K are scaled, by numbers that lie behind all tiles
  static constexpr int RUNS = 1, STEPS = 4, CHUNK = TILE_BYTES;

  static __device__ __forceinline__ u32 run_at(u32 at, int, int) { return at; }

  template <class T>
  static __device__ __forceinline__ void decode(u32 (&a)[4][4], u32 at, int u, int thread, int row) {
    const auto pair = [&](int step, int r, int c) {
      const u32 word = shared_word(at + r * 128 + ((4 * u + step) ^ r % 8) * 16 + (c & ~3));
      return fp8::widened_pair<T>(c & 2 ? word >> 16 : word & 0xffff);
    };
    const int column = thread % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) a[j][i] = pair(j, row + i % 2 * 8, column + i / 2 * 8);
  }
};

template <class F>
constexpr bool IS_E4M3 = false;
template <>
constexpr bool IS_E4M3<E4m3> = true;

// Scales of E4M3 matrices.
enum Scales : int { NO_SCALES = 0, ROW_SCALES = 1, BLOCK_SCALES = 2 };

}  // namespace rvllm::experts
