// E4M3 numbers as the 16-bit types, which hold them exactly.
#pragma once

#include "gemm/fp8/fp8.cuh"

namespace rvllm::fp8 {

using namespace gemm;

// Two neighbouring bytes as elements of T, the first in the low half.
template <class T>
__device__ __forceinline__ u32 widened_pair(u32 bytes) {
#if __CUDA_ARCH__ >= 890
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<u16>(bytes)));
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  const Pack<T, 2> pair{{rounded<T>(both.x), rounded<T>(both.y)}};
#else
  const auto number = [](u32 byte) {  // the exponent's bias is off by 120 in a float32 of these bits; subnormals too
    const float v = __fmul_rn(__uint_as_float((byte & 0x7f) << 20), 1.329227995784916e36f);
    return (byte & 0x7f) == 0x7f ? __uint_as_float(0x7fffffff) : byte & 0x80 ? -v : v;
  };
  const Pack<T, 2> pair{{rounded<T>(number(bytes & 0xff)), rounded<T>(number(bytes >> 8 & 0xff))}};
#endif
  return *reinterpret_cast<const u32*>(&pair);
}

}  // namespace rvllm::fp8
