// The norm of one short slice by one warp, shared by the kernels that normalise heads.
#pragma once

#include "common/common.cuh"

// What a lane needs of a slice's weights and biases: they do not depend on the predecessor, so they are fetched
// before it is waited for. Null is ones, zeros.
struct SliceWeights {
  float2 w[4], b[4];
  __device__ __forceinline__ SliceWeights(const float* __restrict__ weight, const float* __restrict__ bias, int group,
                                          int lane) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int i = lane + 32 * k;
      const bool in = i < group / 2;
      w[k] = in && weight ? make_float2(weight[2 * i], weight[2 * i + 1]) : make_float2(1.f, 1.f);
      b[k] = in && bias ? make_float2(bias[2 * i], bias[2 * i + 1]) : make_float2(0.f, 0.f);
    }
  }
};

// out = norm(in) for `group` elements, two a word; group even and <= 256.
template <typename T, bool LAYER>
__device__ __forceinline__ void norm_slice(u32* out, const u32* in, const SliceWeights& weights, int group, float eps,
                                           int lane) {
  float2 v[4];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = lane + 32 * k;
    v[k] = i < group / 2 ? unpack2<T>(in[i]) : make_float2(0.f, 0.f);
    sum = LAYER ? sum + v[k].x + v[k].y : __fmaf_rn(v[k].y, v[k].y, __fmaf_rn(v[k].x, v[k].x, sum));
  }
  sum = warp_sum(sum);
  float mean = 0.f;
  if (LAYER) {
    mean = sum / group;
    sum = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (lane + 32 * k < group / 2) {
        const float x = v[k].x - mean, y = v[k].y - mean;
        sum = __fmaf_rn(y, y, __fmaf_rn(x, x, sum));
      }
    sum = warp_sum(sum);
  }
  const float factor = 1.f / sqrtf(sum / group + eps);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = lane + 32 * k;
    if (i >= group / 2) continue;
    const float2 w = weights.w[k], b = weights.b[k];
    const float x = __fmaf_rn(__fmul_rn(v[k].x - mean, factor), w.x, b.x);
    const float y = __fmaf_rn(__fmul_rn(v[k].y - mean, factor), w.y, b.y);
    out[i] = pack2<T>(x, y);
  }
}
