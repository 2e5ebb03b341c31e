// What the convolution of Mamba-2 layers is wherever it is computed: its sum, and the inputs a slot keeps of it.
#pragma once

#include "common/activations.cuh"
#include "common/common.cuh"

// A slot keeps its last inputs in rows [2 (K - 1), width] of T, that of position p in row p % (2 (K - 1)): when
// decoding, the row written is none of those that are read.
template <int K> __device__ __forceinline__ int kept_row(int position) { return position % (2 * (K - 1)); }

// act(shift + sum over j of taps[j] * x[j]), taps in order, oldest input first.
template <int K, Act A> __device__ __forceinline__ float convolved(const float (&x)[K], const float (&taps)[K], float shift) {
  float sum = __fmul_rn(x[0], taps[0]);
#pragma unroll
  for (int j = 1; j < K; j++) sum = fmaf(x[j], taps[j], sum);
  return activated<A>(__fadd_rn(sum, shift));
}
