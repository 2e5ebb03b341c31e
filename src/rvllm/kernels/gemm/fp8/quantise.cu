// Activations to e4m3, a scale a token and 128 columns.
#include "gemm/fp8/fp8.cuh"

namespace rvllm::fp8 {

// x [rows, x_pitch] -> q [rows, pitch], scales [pitch / 128, capacity]; columns from `width` to `pitch` become zeros.
// width % 8 == 0, x_pitch % 8 == 0. Half a warp takes a block of 128 columns, eight a lane, and EACH of them at a time.
// Grid: (ceil(pitch / 128 / EACH / half-warps), rows). Bound by latency at decode sizes, by memory at prefill.
template <class T>
__global__ void quantise(const T* __restrict__ x, u8* __restrict__ q, float* __restrict__ scales, int width, int x_pitch,
                         int pitch, int capacity) {
  constexpr int EACH = 4;  // specs.py has it too
  ptx::griddep_launch();
  ptx::griddep_wait();
  const int halves = blockDim.x / 16, half = threadIdx.x / 16, lane = threadIdx.x % 16, row = blockIdx.y;
  const T* const from = x + static_cast<size_t>(row) * x_pitch;
  const auto block = [&](int b) { return (static_cast<int>(blockIdx.x) * EACH + b) * halves + half; };
  uint4 in[EACH];
#pragma unroll
  for (int b = 0; b < EACH; b++) {
    const int column = block(b) * BLOCK_K + lane * 8;
    in[b] = column < width ? *reinterpret_cast<const uint4*>(from + column) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int b = 0; b < EACH; b++) {
    const auto* const pack = reinterpret_cast<const gemm::Pack<T, 8>*>(&in[b]);
    float v[8], amax = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      v[i] = gemm::to_float(pack->v[i]);
      amax = fmaxf(amax, fabsf(v[i]));
    }
#pragma unroll
    for (int d = 8; d; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    if (block(b) * BLOCK_K >= pitch) continue;
    const float inverse = inverse_of(amax);
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      words[i] = to_e4m3x2(__fmul_rn(v[4 * i], inverse), __fmul_rn(v[4 * i + 1], inverse)) |
                 to_e4m3x2(__fmul_rn(v[4 * i + 2], inverse), __fmul_rn(v[4 * i + 3], inverse)) << 16;
    *reinterpret_cast<uint2*>(q + static_cast<size_t>(row) * pitch + block(b) * BLOCK_K + lane * 8) = make_uint2(words[0], words[1]);
    if (lane == 0) scales[static_cast<size_t>(block(b)) * capacity + row] = scale_of(amax);
  }
}

}  // namespace rvllm::fp8
