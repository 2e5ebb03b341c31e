// Rows of a weight matrix into E4M3 tiles (see fp8.cuh): bytes that are E4M3 already, or numbers that get a scale a row.
#include "gemm/fp8/fp8.cuh"

namespace rvllm::fp8 {

// As in gemm/pack.cu: where source row i of a part goes.
__device__ __forceinline__ u64 packed_row(u64 first, u64 i, int interleave) {
  return interleave == 0 ? first + i : first + i / 8 * 16 + i % 8 + (interleave == 2 ? 8 : 0);
}
__device__ __forceinline__ u8* packed_chunk(u8* packed, u64 row, int chunk, int blocks) {
  const u64 tile = row / gemm::TILE * blocks + chunk / 8;
  return packed + tile * gemm::TILE_BYTES + row % gemm::TILE * BLOCK_K + (chunk % 8 ^ row % 8) * 16;
}

// source [rows, k] of E4M3 bytes -> packed rows from `first` on. Rows up to `padded_rows` and columns up to 128 * blocks
// become zeros. Any grid of any block size does.
__global__ void pack_bytes(const u8* __restrict__ source, u8* __restrict__ packed, long long rows, long long padded_rows,
                           int k, int blocks, long long first, int interleave) {
  const u64 chunks = static_cast<u64>(blocks) * 8, count = padded_rows * chunks;
  const bool whole = k % 16 == 0 && reinterpret_cast<u64>(source) % 16 == 0;
  for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < count; i += static_cast<u64>(gridDim.x) * blockDim.x) {
    const u64 row = i / chunks;
    const int chunk = i % chunks, column = chunk * 16;
    alignas(16) u8 out[16] = {};
    if (row < static_cast<u64>(rows)) {
      if (whole && column < k) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(source + row * k + column);
      } else {
#pragma unroll
        for (int j = 0; j < 16; j++)
          if (column + j < k) out[j] = source[row * k + column + j];
      }
    }
    *reinterpret_cast<uint4*>(packed_chunk(packed, packed_row(first, row, interleave), chunk, blocks)) = *reinterpret_cast<uint4*>(out);
  }
}

__device__ __forceinline__ float number(float v) { return v; }
__device__ __forceinline__ float number(bf16 v) { return gemm::to_float(v); }
__device__ __forceinline__ float number(f16 v) { return gemm::to_float(v); }

// source [rows, k] -> E4M3 with a scale a row, scales[packed row]: the largest of a row becomes 448. Grid: any; a block a row
// at a time. Block: 256.
template <class S>
__global__ void __launch_bounds__(256)
    quantise_rows(const S* __restrict__ source, u8* __restrict__ packed, float* __restrict__ scales, long long rows,
                  long long padded_rows, int k, int blocks, long long first, int interleave) {
  __shared__ float largest[8];
  for (long long row = blockIdx.x; row < padded_rows; row += gridDim.x) {
    const S* from = source + row * k;
    float amax = 0.f;
    if (row < rows)
      for (int i = threadIdx.x; i < k; i += 256) amax = fmaxf(amax, fabsf(number(from[i])));
#pragma unroll
    for (int d = 16; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    __syncthreads();  // the last row's has been read
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = amax;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fmaxf(amax, largest[i]);
    const float inverse = inverse_of(amax);
    const u64 to = packed_row(first, row, interleave);
    for (int chunk = threadIdx.x; chunk < blocks * 8; chunk += 256) {
      alignas(16) u8 out[16] = {};
      if (row < rows) {
#pragma unroll
        for (int j = 0; j < 16; j++)
          if (chunk * 16 + j < k) out[j] = to_e4m3(__fmul_rn(number(from[chunk * 16 + j]), inverse));
      }
      *reinterpret_cast<uint4*>(packed_chunk(packed, to, chunk, blocks)) = *reinterpret_cast<uint4*>(out);
    }
    if (threadIdx.x == 0) scales[to] = row < rows ? scale_of(amax) : 0.f;
  }
}

// Random numbers for --load-format dummy: `count` bytes of E4M3, near a normal distribution of deviation 60.
__global__ void fill_bytes(u8* __restrict__ out, u64 count, u32 seed) {
  for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < count; i += static_cast<u64>(gridDim.x) * blockDim.x) {
    u64 z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const float uniform = static_cast<float>((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
    out[i] = to_e4m3((uniform / 65536.f - 2.f) * 104.f);  // four uniform numbers: deviation sqrt(1 / 3)
  }
}
__global__ void fill_scales(float* __restrict__ out, u64 count, float value) {
  for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < count; i += static_cast<u64>(gridDim.x) * blockDim.x)
    out[i] = value;
}

}  // namespace rvllm::fp8
