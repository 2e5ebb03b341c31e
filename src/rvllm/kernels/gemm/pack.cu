// Packs rows of a weight matrix into the tiles that the matrix kernels read (see gemm/gemm.cuh).
#include "gemm/gemm.cuh"

namespace rvllm::gemm {

// Where source row i of a part goes. PLAIN keeps the order; GATE and UP interleave two matrices by eights:
// packed rows 16 j .. 16 j + 7 are gate rows 8 j .. 8 j + 7 and the next eight the up rows of that number.
enum Interleave : int { PLAIN = 0, GATE = 1, UP = 2 };

__device__ __forceinline__ u64 packed_row(u64 first, u64 i, int interleave) {
  return interleave == PLAIN ? first + i : first + i / 8 * 16 + i % 8 + (interleave == UP ? 8 : 0);
}

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(bf16 v) { return to_float(v); }
__device__ __forceinline__ float widened(f16 v) { return to_float(v); }

// source [rows, k] (element (i, j) at i * row_stride + j * column_stride) -> packed rows from `first` on.
// Rows up to `padded_rows` and columns up to 64 * blocks become zeros. Any grid of any block size does.
template <class S, class T>
__global__ void pack(const S* __restrict__ source, u8* __restrict__ packed, long long rows, long long padded_rows,
                     int k, long long row_stride, long long column_stride, int blocks, long long first,
                     int interleave) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  const u64 chunks = static_cast<u64>(blocks) * (TILE / 8), count = padded_rows * chunks;
  const bool whole = sizeof(S) == 2 && column_stride == 1 && row_stride % 8 == 0 && reinterpret_cast<u64>(source) % 16 == 0;
  for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<u64>(gridDim.x) * blockDim.x) {
    const u64 row = i / chunks;
    const u32 column = i % chunks * 8;
    const S* from = source + row * row_stride + column * column_stride;
    alignas(16) S in[8] = {};
    alignas(16) T to[8];
    if (row < static_cast<u64>(rows)) {
      if (whole && column + 8 <= k) {
        *reinterpret_cast<uint4*>(in) = ptx::load_stream(from);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
          if (column + j < k) in[j] = from[j * column_stride];
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) to[j] = rounded<T>(widened(in[j]));
    *reinterpret_cast<uint4*>(packed + packed_offset(packed_row(first, row, interleave), column, blocks)) =
        *reinterpret_cast<uint4*>(to);
  }
}

}  // namespace rvllm::gemm
