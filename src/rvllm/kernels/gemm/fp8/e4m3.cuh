// Rounding to E4M3 and back, for every kernel that writes quantised activations or weights.
#pragma once

#include "ptx/ptx.cuh"

namespace rvllm::fp8 {

inline constexpr float LARGEST = 448.f;

// The nearest number of e4m3 (ties to even, beyond 448: 448), as its byte; NaN stays NaN.
__device__ __forceinline__ u8 to_e4m3(float v) {
  const u32 bits = __float_as_uint(v), sign = bits >> 24 & 0x80;
  const float a = fabsf(v);
  if (!(a == a)) return 0x7f;
  if (a >= LARGEST) return sign | 0x7e;
  if (a < 0.015625f) return sign | static_cast<u32>(rintf(a * 512.f));  // subnormal: steps of 2^-9; 8 is 2^-6
  const u32 m = __float_as_uint(a), even = m + 0x7ffff + (m >> 20 & 1);  // round the mantissa to 3 bits
  return sign | ((even >> 20) - ((127 - 7) << 3));
}
// Two of them: low in the low byte.
__device__ __forceinline__ u32 to_e4m3x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  return to_e4m3(low) | to_e4m3(high) << 8;
#endif
}
__device__ __forceinline__ float from_e4m3(u32 byte) {
  const u32 exponent = byte >> 3 & 15, mantissa = byte & 7;
  float a = exponent == 0 ? mantissa * 0.001953125f : __uint_as_float((exponent + 120) << 23 | mantissa << 20);
  if ((byte & 0x7f) == 0x7f) a = __uint_as_float(0x7fffffff);
  return byte & 0x80 ? -a : a;
}

// The scale of numbers of which the largest is `amax`, and what to multiply them with.
__device__ __forceinline__ float scale_of(float amax) { return __fmul_rn(fmaxf(amax, 1e-30f), 1.f / LARGEST); }
__device__ __forceinline__ float inverse_of(float amax) { return __fdiv_rn(LARGEST, fmaxf(amax, 1e-30f)); }

// The largest of a warp's numbers; it holds the 256 columns that share a scale, eight a lane.
__device__ __forceinline__ float largest_of_group(float amax) {
#pragma unroll
  for (int d = 16; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  return amax;
}
// Eight numbers times `inverse`, as codes.
__device__ __forceinline__ uint2 codes_of(const float (&v)[8], float inverse) {
  u32 words[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    words[i] = to_e4m3x2(__fmul_rn(v[4 * i], inverse), __fmul_rn(v[4 * i + 1], inverse)) |
               to_e4m3x2(__fmul_rn(v[4 * i + 2], inverse), __fmul_rn(v[4 * i + 3], inverse)) << 16;
  return make_uint2(words[0], words[1]);
}

}  // namespace rvllm::fp8
