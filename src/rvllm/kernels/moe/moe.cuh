// What the kernels of experts share. Weights are stacks of packed matrices (see gemm/gemm.cuh), one an expert, each
// ceil(rows / 64) * ceil(K / 64) tiles; gate and up rows take turns of eight as in the dense kernels.
//
// Entries. Token t's j-th choice is entry t * top_k + j. A row of `inner` (the experts' activations) and of
// `parts` (their results, before they are weighted) belongs to one entry.
//
// Batch invariance. K is cut into `segments`, which depend on the weight's shape alone. A segment is summed by
// consecutive 16-wide matrix instructions into one accumulator, the segments are added in ascending order, and
// what one expert gives one token is rounded to the 16-bit type before it is weighted. All kernels do exactly
// that, so a token's result does not depend on who shares its experts, nor on which kernel ran.
#pragma once

#include "gemm/gemm.cuh"

//
// Dependent launches. The product with the up matrices lets its successor start only once it has itself waited for
// its predecessor. So when the product with the down matrices starts, what the router and the sort wrote is there,
// and its weights can come before the wait for the activations.

namespace rvllm::experts {

using gemm::segment_start;
using gemm::TILE;
using gemm::TILE_BYTES;

constexpr int PLAIN = -1;  // no activation; else a value of Act
constexpr int SLICE = 16;  // rows of W that one warp's matrix instruction takes
constexpr int SLICE_BYTES = SLICE * TILE * 2;

// Bytes of one expert's packed matrix.
__device__ __forceinline__ u64 matrix_bytes(int rows, int blocks) {
  return static_cast<u64>((rows + TILE - 1) / TILE) * blocks * TILE_BYTES;
}

// An expert that exists. Routers choose no others, but a profile times kernels apart from the router, on whatever lies
// where it would have written.
__device__ __forceinline__ int existing(int expert, int experts) {
  return static_cast<int>(min(static_cast<u32>(expert), static_cast<u32>(experts - 1)));
}

// act(gate) * up, each factor rounded first as separate ops would.
template <class T>
__device__ __forceinline__ T gated_value(float gate, float up, int act) {
  const float g = gemm::to_float(gemm::rounded<T>(gate)), u = gemm::to_float(gemm::rounded<T>(up));
  return gemm::rounded<T>(__fmul_rn(activated(g, static_cast<Act>(act)), u));
}
template <class T>
__device__ __forceinline__ T plain_value(float sum, int act) {
  const T v = gemm::rounded<T>(sum);
  return act == PLAIN ? v : gemm::rounded<T>(activated(gemm::to_float(v), static_cast<Act>(act)));
}

// One more weighted part of a token's sum; the first one is multiplied only.
__device__ __forceinline__ float weighted(float sum, float part, float share, bool first) {
  return first ? __fmul_rn(part, share) : __fmaf_rn(part, share, sum);
}

}  // namespace rvllm::experts
