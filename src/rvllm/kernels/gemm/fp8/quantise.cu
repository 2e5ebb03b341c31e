// Activations to e4m3, a scale a token and 256 columns.
#include "gemm/fp8/fp8.cuh"

namespace rvllm::fp8 {

// x [rows, x_pitch] -> q [rows, pitch], scales [ceil(pitch / 256), capacity]; columns from `width` to `pitch` become zeros.
// width % 8 == 0, x_pitch % 8 == 0. A warp takes 256 columns, eight a lane, and EACH times as many at a time.
// Grid: (ceil(pitch / 256 / EACH / warps), rows). Bound by latency at decode sizes, by memory at prefill.
template <class T>
__global__ void quantise(const T* __restrict__ x, u8* __restrict__ q, float* __restrict__ scales, int width, int x_pitch,
                         int pitch, int capacity) {
  constexpr int EACH = 4;  // specs.py has it too
  ptx::griddep_launch();
  ptx::griddep_wait();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const T* const from = x + static_cast<size_t>(row) * x_pitch;
  const auto group = [&](int b) { return (static_cast<int>(blockIdx.x) * EACH + b) * warps + warp; };
  uint4 in[EACH];
#pragma unroll
  for (int b = 0; b < EACH; b++) {
    const int column = group(b) * SCALE_K + lane * 8;
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
    amax = largest_of_group(amax);
    const int column = group(b) * SCALE_K + lane * 8;
    if (column >= pitch) continue;
    *reinterpret_cast<uint2*>(q + static_cast<size_t>(row) * pitch + column) = codes_of(v, inverse_of(amax));
    if (lane == 0) scales[static_cast<size_t>(group(b)) * capacity + row] = scale_of(amax);
  }
}

}  // namespace rvllm::fp8
