// What all kernels share: element types, programmatic dependent launch, asynchronous copies, warp and
// block reductions of fixed order. Nothing in here depends on an architecture above sm_80 unguarded.
#pragma once

#include "ptx/ptx.cuh"

using namespace rvllm;
using namespace rvllm::ptx;

#define INFINITY_F __int_as_float(0x7f800000)
#define LOG2E 1.4426950408889634f

// Programmatic dependent launch: every kernel calls griddep_launch first (its successor may start and
// prefetch what does not depend on it) and griddep_wait before it reads what a predecessor wrote or writes
// what one may still read. At least one block of a grid must wait, or the order of the chain is lost.

// ---- element types -----------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

// Two neighbouring elements as one register, the first in the low half.
template <typename T> __device__ __forceinline__ u32 pack2(float a, float b);
template <> __device__ __forceinline__ u32 pack2<bf16>(float a, float b) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<u32*>(&v);
}
template <> __device__ __forceinline__ u32 pack2<f16>(float a, float b) {
  __half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<u32*>(&v);
}

template <typename T> __device__ __forceinline__ float2 unpack2(u32 v);
template <> __device__ __forceinline__ float2 unpack2<bf16>(u32 v) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v));
}
template <> __device__ __forceinline__ float2 unpack2<f16>(u32 v) {
  return __half22float2(*reinterpret_cast<__half2*>(&v));
}

// Eight 16-bit elements of a 16-byte vector as floats, and back.
template <typename T> __device__ __forceinline__ void unpack8(const uint4& v, float (&x)[8]) {
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 f = unpack2<T>(w[i]);
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}

template <typename T> __device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// ---- arithmetic and reductions -----------------------------------------------------------------------
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  return x;
}

// Sum over the block, the same bits in every thread; `scratch` holds 32 elements. All threads must call.
template <typename V> __device__ __forceinline__ V block_sum(V x, V* scratch) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  const int warps = blockDim.x / 32;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  V total = scratch[0];
  for (int w = 1; w < warps; w++) total += scratch[w];
  return total;
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  const int warps = blockDim.x / 32;
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float best = scratch[0];
  for (int w = 1; w < warps; w++) best = fmaxf(best, scratch[w]);
  return best;
}
