// E4M3 weights and activations: how they lie in memory, and how a number is rounded to it.
//
//   y[t, n] = row_scale[n] * sum over blocks b of 128 along K of
//             block_scale[n, b] * x_scale[t, b] * sum over k in b of q[t, k] * w[n, k]
//
// Weights: tiles of 64 rows x 128 columns, 8 KB each, one byte an element, in the same image as 16-bit tiles
// (gemm/gemm.cuh): row r of a tile at 128 r, its 16-byte chunk c at 16 (c ^ (r % 8)), the tiles of 64 rows one behind
// the other along K. Rows and columns are padded with zeros. Behind them, float32 scales: [rows] or, for
// blocks, [ceil(K / 128)][ceil(rows / 64)][8], one for eight neighbouring rows of a tile; see backends/cuda/formats/fp8.py.
//
// Activations: q [T][pitch], pitch a multiple of 128, zeros behind K; scales float32 [pitch / 128][capacity].
#pragma once

#include "gemm/fp8/e4m3.cuh"
#include "gemm/gemm.cuh"

namespace rvllm::fp8 {

inline constexpr int BLOCK_K = 128;  // columns of a tile, and of a scale of the activations

}  // namespace rvllm::fp8
