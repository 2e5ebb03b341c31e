// Rotary embedding of pairs, shared by the kernels that turn heads.
#pragma once

#include "common/common.cuh"

// The pair (a, b) turned by an angle of cosine c and sine s; explicit, so that all kernels round alike.
__device__ __forceinline__ float turned_first(float a, float b, float c, float s) { return __fmaf_rn(a, c, -__fmul_rn(b, s)); }
__device__ __forceinline__ float turned_second(float a, float b, float c, float s) { return __fmaf_rn(b, c, __fmul_rn(a, s)); }

// Two elements of the first half of a head and two of the second, turned.
template <typename T>
__device__ __forceinline__ void turn_halves(u32& first, u32& second, float2 c, float2 s) {
  const float2 a = unpack2<T>(first), b = unpack2<T>(second);
  first = pack2<T>(turned_first(a.x, b.x, c.x, s.x), turned_first(a.y, b.y, c.y, s.y));
  second = pack2<T>(turned_second(a.x, b.x, c.x, s.x), turned_second(a.y, b.y, c.y, s.y));
}
