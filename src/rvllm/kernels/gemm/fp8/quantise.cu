// Activations to e4m3, a scale a token and 128 columns.
#include "gemm/fp8/fp8.cuh"

namespace rvllm::fp8 {

// x [rows, x_pitch] -> q [rows, pitch], scales [pitch / 128, capacity]; columns from `width` to `pitch` become zeros.
// width % 4 == 0. A warp a block of 128 columns, four columns a lane.
// Grid: (ceil(pitch / 128 / warps), rows). Bound by latency at decode sizes, by memory at prefill.
template <class T>
__global__ void quantise(const T* __restrict__ x, u8* __restrict__ q, float* __restrict__ scales, int width, int x_pitch,
                         int pitch, int capacity) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  const int block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  if (block * BLOCK_K >= pitch) return;
  const int column = block * BLOCK_K + lane * 4;
  gemm::Pack<T, 4> in;
#pragma unroll
  for (int i = 0; i < 4; i++) in.v[i] = gemm::rounded<T>(0.f);
  if (column < width) in = *reinterpret_cast<const gemm::Pack<T, 4>*>(x + static_cast<size_t>(row) * x_pitch + column);
  float v[4], amax = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    v[i] = gemm::to_float(in.v[i]);
    amax = fmaxf(amax, fabsf(v[i]));
  }
#pragma unroll
  for (int d = 16; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
  const float inverse = inverse_of(amax);
  const u32 word = to_e4m3x2(__fmul_rn(v[0], inverse), __fmul_rn(v[1], inverse)) |
                   to_e4m3x2(__fmul_rn(v[2], inverse), __fmul_rn(v[3], inverse)) << 16;
  *reinterpret_cast<u32*>(q + static_cast<size_t>(row) * pitch + column) = word;
  if (lane == 0) scales[static_cast<size_t>(block) * capacity + row] = scale_of(amax);
}

}  // namespace rvllm::fp8
