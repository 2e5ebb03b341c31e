// A step's input: from L2 to shared memory, normalised on the way by the instructions of `norm` (rowwise/norm.cu).
#pragma once

#include "decode/step.cuh"

namespace rvllm::decode {

inline constexpr int NORM_PARTS = 4;  // vectors of 8 elements of a thread in a norm: rows of up to 8,192

// The parameters of a norm for the vectors of 8 that fall to a thread. They depend on no kernel before.
struct NormWeights {
  float4 w[NORM_PARTS][2];
  __device__ void load(const float* weight, int vectors, int warp, int lane) {
#pragma unroll
    for (int p = 0; p < NORM_PARTS; p++) {
      const int i = (warp + p * WARPS) * 32 + lane;
#pragma unroll
      for (int h = 0; h < 2; h++)
        w[p][h] = weight && i < vectors ? reinterpret_cast<const float4*>(weight)[2 * i + h] : make_float4(1.f, 1.f, 1.f, 1.f);
    }
  }
};

// Brings the step's x to shared memory, normed where a norm stands before it; zeros behind k up to a whole block. Of DOWN
// a row for each expert.
template <class T>
__device__ __forceinline__ void load_x(const Step& s, u8* x, const NormWeights& weights, float (*scratch)[32], int warp, int lane) {
  const int vectors = s.k / 8, places = s.blocks * 8;
  uint4* const to = reinterpret_cast<uint4*>(x);
  const u8* const from = static_cast<const u8*>(s.x);
  if (!s.normed) {
    for (int i = threadIdx.x; i < places * (s.type == DOWN ? s.entries : 1); i += THREADS) {
      const int row = i / places, column = i % places;
      to[i] = column < vectors ? load_l2(from + (static_cast<size_t>(row) * vectors + column) * 16) : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    return;
  }
  for (int i = vectors + threadIdx.x; i < places; i += THREADS) to[i] = make_uint4(0, 0, 0, 0);
  uint4 raw[NORM_PARTS];
  const int parts = (vectors + 31) / 32;
  const auto place = [&](int p) { return (warp + p * WARPS) * 32 + lane; };
#pragma unroll
  for (int p = 0; p < NORM_PARTS; p++) raw[p] = place(p) < vectors ? load_l2(from + place(p) * 16) : make_uint4(0, 0, 0, 0);
  // The sum of one value a vector, as block_sum adds it up with a vector a thread.
  const auto total = [&](float* sums, auto value) {
#pragma unroll
    for (int p = 0; p < NORM_PARTS; p++) {
      if (warp + p * WARPS >= parts) break;
      float v[8];
      unpack8<T>(raw[p], v);
      const float sum = warp_sum(value(v, place(p) < vectors));
      if (lane == 0) sums[warp + p * WARPS] = sum;
    }
    __syncthreads();
    float all = sums[0];
    for (int i = 1; i < parts; i++) all += sums[i];
    return all;
  };
  float mean = 0.f, squares;
  if (s.layer) {
    mean = total(scratch[0], [](const float(&v)[8], bool) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) sum = sum + v[j];
      return sum;
    }) / s.k;
    squares = total(scratch[1], [&](const float(&v)[8], bool in) {
      float sum = 0.f;
      if (in) {
#pragma unroll
        for (int j = 0; j < 8; j++) sum = __fmaf_rn(v[j] - mean, v[j] - mean, sum);
      }
      return sum;
    });
  } else {
    squares = total(scratch[1], [](const float(&v)[8], bool) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) sum = __fmaf_rn(v[j], v[j], sum);
      return sum;
    });
  }
  const float factor = 1.f / sqrtf(squares / s.k + s.eps);
#pragma unroll
  for (int p = 0; p < NORM_PARTS; p++) {
    const int i = place(p);
    if (i >= vectors) continue;
    float v[8];
    unpack8<T>(raw[p], v);
    const float4 low = weights.w[p][0], high = weights.w[p][1];
    const float by[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float b = s.norm_bias ? s.norm_bias[8 * i + j] : 0.f;
      v[j] = __fmaf_rn(__fmul_rn(__fsub_rn(v[j], mean), factor), by[j], b);
    }
    to[i] = pack8<T>(v);
    if (blockIdx.x == 0) static_cast<uint4*>(s.normed)[i] = to[i];
  }
  __syncthreads();
}

}  // namespace rvllm::decode
