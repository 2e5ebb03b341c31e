// The norm of one short slice by one warp, shared by the kernels that normalise heads.
#pragma once

#include "common.cuh"

// out = norm(in) for `group` elements, two a word; group even and <= 256. weight, bias: null is ones, zeros.
template <typename T, bool LAYER>
__device__ __forceinline__ void norm_slice(u32* out, const u32* in, const float* __restrict__ weight,
                                           const float* __restrict__ bias, int group, float eps, int lane) {
  float2 v[4];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = lane + 32 * k;
    v[k] = i < group / 2 ? unpack2<T>(in[i]) : make_float2(0.f, 0.f);
    sum += LAYER ? v[k].x + v[k].y : v[k].x * v[k].x + v[k].y * v[k].y;
  }
  sum = warp_sum(sum);
  float mean = 0.f;
  if (LAYER) {
    mean = sum / group;
    sum = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (lane + 32 * k < group / 2)
        sum += (v[k].x - mean) * (v[k].x - mean) + (v[k].y - mean) * (v[k].y - mean);
    sum = warp_sum(sum);
  }
  const float factor = 1.f / sqrtf(sum / group + eps);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int i = lane + 32 * k;
    if (i >= group / 2) continue;
    const float2 w = weight ? make_float2(weight[2 * i], weight[2 * i + 1]) : make_float2(1.f, 1.f);
    const float2 b = bias ? make_float2(bias[2 * i], bias[2 * i + 1]) : make_float2(0.f, 0.f);
    out[i] = pack2<T>((v[k].x - mean) * factor * w.x + b.x, (v[k].y - mean) * factor * w.y + b.y);
  }
}
