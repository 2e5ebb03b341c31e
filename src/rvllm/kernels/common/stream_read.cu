// Reads memory as fast as it can: the ceiling that weight-streaming kernels are measured against.
#include "ptx/ptx.cuh"

namespace rvllm {

// XORs `count` 16-byte words at `source` and adds a trace of the result to *sink, so that nothing is
// optimised away. Any grid of any block size; a few thousand threads a multiprocessor do best.
__global__ void stream_read(const uint4* __restrict__ source, u64 count, u32* sink) {
  constexpr int DEEP = 8;
  const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
  u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x;
  uint4 sum = {0, 0, 0, 0};
  const auto mix = [&](uint4 v) { sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w; };
  for (; i + (DEEP - 1) * stride < count; i += DEEP * stride) {
    uint4 v[DEEP];
#pragma unroll
    for (int j = 0; j < DEEP; j++) v[j] = ptx::load_stream(source + i + j * stride);
#pragma unroll
    for (int j = 0; j < DEEP; j++) mix(v[j]);
  }
  for (; i < count; i += stride) mix(ptx::load_stream(source + i));
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x9E3779B9u) atomicAdd(sink, 1u);
}

}  // namespace rvllm
