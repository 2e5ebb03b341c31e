// E4M3 weights and activations: how they lie in memory, and how a number is rounded to it.
//
//   y[t, n] = row_scale[n] * sum over blocks b of 256 along K of x_scale[t, b] * sum over k in b of q[t, k] * w[n, k]
//
// or, where weights have scales for 128 along K, the sum over blocks c of 128 of block_scale[n, c] * x_scale[t, c / 2] * ...
//
// Weights: tiles of 64 rows x 128 columns, 8 KB each, one byte an element, in the same image as 16-bit tiles
// (gemm/gemm.cuh): row r of a tile at 128 r, its 16-byte chunk c at 16 (c ^ (r % 8)), the tiles of 64 rows one behind
// the other along K. Rows and columns are padded with zeros. Behind them, float32 scales: [rows] or, for
// blocks, [ceil(K / 128)][ceil(rows / 64)][8], one for eight neighbouring rows of a tile; see backends/cuda/formats/fp8.py.
//
// Activations: q [T][pitch], pitch a multiple of 128, zeros behind K; scales float32 [ceil(pitch / 256)][capacity].
#pragma once

#include "gemm/fp8/e4m3.cuh"
#include "gemm/gemm.cuh"

namespace rvllm::fp8 {

inline constexpr int BLOCK_K = 128;     // columns of a tile
inline constexpr int SCALE_BLOCKS = 2;  // of which the activations share a scale
inline constexpr int SCALE_K = SCALE_BLOCKS * BLOCK_K;

__device__ __forceinline__ int scale_groups(int blocks) { return (blocks + SCALE_BLOCKS - 1) / SCALE_BLOCKS; }
// Segments of K consist of whole groups of blocks that share a scale.
__device__ __forceinline__ int segment_begin(int blocks, int segments, int s) {
  return min(blocks, scale_groups(blocks) * s / segments * SCALE_BLOCKS);
}
__device__ __forceinline__ int widest_segment(int blocks, int segments) {
  return min(blocks, (scale_groups(blocks) + segments - 1) / segments * SCALE_BLOCKS);
}

}  // namespace rvllm::fp8
