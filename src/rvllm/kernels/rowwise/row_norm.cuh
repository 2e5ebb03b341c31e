// A block normalises a row, with the residual add in front when wanted: what the norm's own kernel and those that compute
// the addend share. All sums are float32 in an order that depends on the width alone.
#pragma once

#include "common/common.cuh"

// Explicit instructions: a fused kernel gives the bits of the separate ones.
__device__ __forceinline__ float plus_square(float sum, float v) { return __fmaf_rn(v, v, sum); }
__device__ __forceinline__ float finished(float v, float mean, float factor, float w, float b) {
  return __fmaf_rn(__fmul_rn(__fsub_rn(v, mean), factor), w, b);
}

// ADD: x += y * scale (rounded to T, stored), then norm(x); otherwise norm(x). addend(i, a): the block's row of y from
// element 8 * i on. store(i, in, v): likewise, of what the row became; in: whether there is such a place.
// LAYER: (x - mean) / sqrt(var + eps) * weight + bias; otherwise x / sqrt(mean(x^2) + eps) * weight.
// x, y [rows, width], width % 8 == 0 and width <= 8 * VECTORS * blockDim; weight, bias float32 [width] or null.
// Grid: (rows). Block: VECTORS 16-byte vectors a thread; see plan_norm. Bound by latency at decode sizes (one
// block a row), by memory at prefill.
template <typename T, bool LAYER, bool ADD, int VECTORS, class Addend, class Store>
__device__ __forceinline__ void norm_row(T* x, Addend addend, const float* weight, const float* bias, int width, float eps,
                                         float scale, Store store) {
  griddep_launch();
  __shared__ float scratch[32];
  const int vectors = width / 8;
  alignas(16) float w[8], b[8];
  float v[VECTORS][8];
  const auto parameters = [&](int i) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const bool in = i < vectors;
      const float4 one = make_float4(1.f, 1.f, 1.f, 1.f), zero = make_float4(0.f, 0.f, 0.f, 0.f);
      *reinterpret_cast<float4*>(w + j) = in && weight ? *reinterpret_cast<const float4*>(weight + i * 8 + j) : one;
      if (LAYER) *reinterpret_cast<float4*>(b + j) = in && bias ? *reinterpret_cast<const float4*>(bias + i * 8 + j) : zero;
    }
  };
  if (VECTORS == 1) parameters(threadIdx.x);  // they do not depend on the predecessor
  griddep_wait();
  uint4* const row = reinterpret_cast<uint4*>(x + (size_t)blockIdx.x * width);
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = threadIdx.x + k * blockDim.x;
#pragma unroll
    for (int j = 0; j < 8; j++) v[k][j] = 0.f;
    if (i < vectors) {
      unpack8<T>(row[i], v[k]);
      if (ADD) {
        float a[8];
        addend(i, a);
#pragma unroll
        for (int j = 0; j < 8; j++) v[k][j] = fmaf(a[j], scale, v[k][j]);
        const uint4 rounded = pack8<T>(v[k]);
        row[i] = rounded;
        unpack8<T>(rounded, v[k]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum = LAYER ? sum + v[k][j] : plus_square(sum, v[k][j]);
  }
  sum = block_sum(sum, scratch);
  float mean = 0.f;
  if (LAYER) {
    mean = sum / width;
    sum = 0.f;
#pragma unroll
    for (int k = 0; k < VECTORS; k++)
      if (threadIdx.x + k * blockDim.x < vectors) {
#pragma unroll
        for (int j = 0; j < 8; j++) sum = plus_square(sum, v[k][j] - mean);
      }
    sum = block_sum(sum, scratch);
  }
  const float factor = 1.f / sqrtf(sum / width + eps);
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < vectors) {
      if (VECTORS > 1) parameters(i);
#pragma unroll
      for (int j = 0; j < 8; j++) v[k][j] = finished(v[k][j], mean, factor, w[j], LAYER ? b[j] : 0.f);
    }
    store(i, i < vectors, v[k]);
  }
}

// The block's row of y, as norm_row asks for it.
template <typename T>
__device__ __forceinline__ auto row_of(const T* y, int width) {
  const uint4* const row = reinterpret_cast<const uint4*>(y + (size_t)blockIdx.x * width);
  return [row](int i, float(&a)[8]) { unpack8<T>(row[i], a); };
}
