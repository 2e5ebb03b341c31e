// Seeded random weights for runs without a checkpoint, and a checksum of device memory for tests.
#include "common/common.cuh"

// A 32-bit finaliser (Wellons' low-bias constants) over an element's number and a seed.
__device__ __forceinline__ u32 mixed(u32 x, u32 seed) {
  x = (x ^ seed) * 0x9e3779b9u;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Near normal with mean 0 and deviation 1: the sum of a hash's four bytes (Irwin-Hall of four), standardised.
__device__ __forceinline__ float near_normal(u64 index, u32 seed) {
  const u32 h = mixed((u32)index, seed ^ (u32)(index >> 32) * 0x85ebca6bu);
  return ((float)__dp4a(h, 0x01010101u, 0u) - 510.f) * (1.f / 147.801f);
}

// out[i] = mean + std * near_normal(first + i), n % 8 == 0; the same numbers whatever the grid.
// Grid: any. Bound by memory (writes).
template <typename T>
__global__ void fill_random(T* __restrict__ out, size_t n, u64 first, u32 seed, float mean, float std) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n / 8; i += step) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = __fmaf_rn(near_normal(first + i * 8 + j, seed), std, mean);
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<float4*>(out + i * 8)[0] = make_float4(x[0], x[1], x[2], x[3]);
      reinterpret_cast<float4*>(out + i * 8)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      reinterpret_cast<uint4*>(out)[i] = pack8<T>(x);
    }
  }
}

// *sum += over 32-bit words of mixed(word, its number): the same for equal memory, whatever the grid.
// sum must be zeroed before. Grid: any. Bound by memory (reads).
extern "C" __global__ void checksum(u64* sum, const u32* __restrict__ words, size_t n) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  u64 mine = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += step) mine += mixed(words[i], (u32)i);
#pragma unroll
  for (int o = 16; o; o >>= 1) mine += __shfl_xor_sync(~0u, mine, o);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, mine);
}
