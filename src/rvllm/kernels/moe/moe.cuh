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

inline constexpr int PLAIN = -1;  // no activation; else a value of Act
inline constexpr int SLICE = 16;  // rows of W that one warp's matrix instruction takes
inline constexpr int SLICE_BYTES = SLICE * TILE * 2;

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

// Eight neighbouring elements, from element i on, of the sum over j, in order, of shares[t, j] * parts[p(t * top_k + j)]. p:
// places, or each entry's own number where that is null. parts [tokens * top_k, width].
template <class T>
__device__ __forceinline__ gemm::Pack<T, 8> weighted_parts(const T* parts, const float* shares, const int* places, int token,
                                                           int top_k, int width, int i) {
  float total[8] = {};
#pragma unroll 8
  for (int j = 0; j < top_k; j++) {
    const size_t entry = static_cast<size_t>(token) * top_k + j;
    const size_t place = places ? places[entry] : entry;
    const auto part = *reinterpret_cast<const gemm::Pack<T, 8>*>(parts + place * width + i);
    const float share = shares[entry];
#pragma unroll
    for (int c = 0; c < 8; c++) total[c] = weighted(total[c], gemm::to_float(part.v[c]), share, j == 0);
  }
  gemm::Pack<T, 8> value;
#pragma unroll
  for (int c = 0; c < 8; c++) value.v[c] = gemm::rounded<T>(total[c]);
  return value;
}

// The sums of ROWS rows of W and `count` entries, in shared memory as [entry][PITCH], to where they belong: through the
// activation; of the up matrix (by_token) a row a place in `order`, from `first` on, of the down matrix a row an entry. order null: a place is
// an entry's own number.
// rows, pitch, act, gated: as in `one_up`. Every thread of the block has arrived at a barrier since they were written.
template <class T, int ROWS, int PITCH, int THREADS>
__device__ __forceinline__ void write_tile(T* out, float* staging, const int* order, int thread, int first,
                                           int count, int row_tile, int rows, int pitch, int act, int gated, int by_token) {
  // Eight outputs at a time: 8 rows, or 8 gates and the 8 ups behind them.
  const int pieces = gated ? ROWS / 16 : ROWS / 8, width = gated ? rows / 2 : rows;
  for (int i = thread; i < count * pieces; i += THREADS) {
    const int token = i / pieces, piece = i % pieces, column = (row_tile * pieces + piece) * 8;
    if (column >= width) continue;
    float* const from = staging + token * PITCH + piece * (gated ? 16 : 8);
    if (act != PLAIN) {
#pragma unroll 1
      for (int c = 0; c < 8; c++)  // not unrolled: five activations eight times are many registers
        from[c] = gemm::to_float(gated ? gated_value<T>(from[c], from[c + 8], act) : plain_value<T>(from[c], act));
    }
    gemm::Pack<T, 8> value;
#pragma unroll
    for (int c = 0; c < 8; c++) value.v[c] = gemm::rounded<T>(from[c]);
    const int place = by_token || !order ? first + token : order[first + token];
    *reinterpret_cast<gemm::Pack<T, 8>*>(out + static_cast<size_t>(place) * pitch + column) = value;
  }
}

}  // namespace rvllm::experts
