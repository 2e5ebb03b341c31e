// Plain weights to INT4, each to the nearest of 16 levels between the least and the greatest of its group (or zero).
#include "common/common.cuh"

namespace rvllm::gemm {

// x [rows, k] -> levels [rows, ceil(k / 8)] words of eight, zeros and scales [rows, ceil(k / 128)]. An element is
// scale * (level - zero). A warp a group; k a multiple of 8. Any grid does, of whole warps.
template <class S>
__global__ void quantise(const S* __restrict__ x, u32* __restrict__ levels, u32* __restrict__ zeros,
                         float* __restrict__ scales, long long rows, int k) {
  griddep_launch();
  griddep_wait();
  const int lane = threadIdx.x % 32, groups = (k + 127) / 128, words = (k + 7) / 8;
  const long long step = static_cast<long long>(gridDim.x) * (blockDim.x / 32);
  for (long long i = blockIdx.x * static_cast<long long>(blockDim.x / 32) + threadIdx.x / 32; i < rows * groups; i += step) {
    const long long row = i / groups;
    const int column = static_cast<int>(i % groups) * 128 + lane * 4;
    float v[4], least = 0.f, greatest = 0.f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[j] = column + j < k ? to_float(x[row * k + column + j]) : 0.f;
      least = fminf(least, v[j]), greatest = fmaxf(greatest, v[j]);
    }
    least = -warp_max(-least), greatest = warp_max(greatest);
    // Rounded as it is kept, so that levels are the nearest of what will be multiplied.
    const float scale = __half2float(__float2half_rn((greatest - least) / 15.f));
    const float zero = scale > 0.f ? fminf(rintf(-least / scale), 15.f) : 0.f;
    u32 half = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float level = scale > 0.f ? fminf(fmaxf(rintf(v[j] / scale) + zero, 0.f), 15.f) : 0.f;
      half |= static_cast<u32>(level) << 4 * j;
    }
    const u32 other = __shfl_down_sync(~0u, half, 1);
    if (lane % 2 == 0 && column < k) levels[row * words + column / 8] = half | other << 16;
    if (lane == 0) zeros[i] = static_cast<u32>(zero), scales[i] = scale;
  }
}

// x [tokens, pitch] -> out [tokens, k]: column j is x's column order[j], zeros where that is -1. k a multiple of 8.
// grid (ceil(k / 8 / threads), tokens).
__global__ void reorder(const u16* __restrict__ x, u16* __restrict__ out, const int* __restrict__ order, int k, int pitch) {
  griddep_launch();
  griddep_wait();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (column >= k) return;
  const u16* const row = x + static_cast<size_t>(blockIdx.y) * pitch;
  alignas(16) u16 v[8];
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = order[column + j] < 0 ? 0 : row[order[column + j]];
  *reinterpret_cast<uint4*>(out + static_cast<size_t>(blockIdx.y) * k + column) = *reinterpret_cast<uint4*>(v);
}

}  // namespace rvllm::gemm
