// Activation functions, with explicit instructions, so that every kernel that inlines them gives the same bits.
#pragma once

#include "ptx/ptx.cuh"

namespace rvllm {

enum class Act : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4 };

__device__ __forceinline__ float silu(float x) { return __fdividef(x, __fadd_rn(1.f, __expf(-x))); }

template <Act A>
__device__ __forceinline__ float activated(float x) {
  if constexpr (A == Act::SILU) return silu(x);
  if constexpr (A == Act::GELU)
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.f, erff(__fmul_rn(x, 0.70710678f))));
  if constexpr (A == Act::GELU_TANH) {
    const float inner = __fmul_rn(0.79788456f, __fmaf_rn(__fmul_rn(0.044715f, x), __fmul_rn(x, x), x));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.f, tanhf(inner)));
  }
  const float r = fmaxf(x, 0.f);
  if constexpr (A == Act::RELU2) return __fmul_rn(r, r);
  return r;
}

// The same where the function is known at run time only.
__device__ __forceinline__ float activated(float x, Act act) {
  switch (act) {
    case Act::SILU: return activated<Act::SILU>(x);
    case Act::GELU: return activated<Act::GELU>(x);
    case Act::GELU_TANH: return activated<Act::GELU_TANH>(x);
    case Act::RELU: return activated<Act::RELU>(x);
    default: return activated<Act::RELU2>(x);
  }
}

// g sigmoid(alpha g) (u + 1) with g <= limit and u within [-limit, limit]; limit 0: no limit (Phi-3-small).
__device__ __forceinline__ float clamped_gate(float g, float u, float limit, float alpha) {
  if (limit > 0.f) {
    g = fminf(g, limit);
    u = fminf(fmaxf(u, -limit), limit);
  }
  const float s = __fdividef(g, __fadd_rn(1.f, __expf(__fmul_rn(-alpha, g))));
  return __fmul_rn(s, __fadd_rn(u, 1.f));
}

}  // namespace rvllm
