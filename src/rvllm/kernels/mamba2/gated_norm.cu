// The norm behind a Mamba-2 scan: gate first, then groups of columns.
#include "common/common.cuh"

// out = RMSNorm over each `group` columns of x * silu(gate), times weight. x, out [T, width]; gate [T, pitch], its
// first columns; weight float32 [width]. group, pitch % 8 == 0, group <= 8 * threads.
// Grid: (width / group, rows). Bound by latency at decode sizes, by memory at prefill.
template <typename T>
__global__ void gated_norm(T* out, const T* x, const T* gate, const float* __restrict__ weight, int width, int pitch,
                           int group, float eps) {
  griddep_launch();
  __shared__ float scratch[32];
  const int column = blockIdx.x * group + threadIdx.x * 8;
  const bool active = threadIdx.x * 8 < group;
  float v[8], w[8];
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = 0.f, w[j] = active ? weight[column + j] : 0.f;
  griddep_wait();
  const size_t at = (size_t)blockIdx.y * width + column;
  float sum = 0.f;
  if (active) {
    float g[8];
    unpack8<T>(load_l2(x + at), v);
    unpack8<T>(load_l2(gate + (size_t)blockIdx.y * pitch + column), g);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[j] *= g[j] / (1.f + __expf(-g[j]));
      sum = fmaf(v[j], v[j], sum);
    }
  }
  sum = block_sum(sum, scratch);
  const float factor = 1.f / sqrtf(sum / group + eps);
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] *= factor * w[j];
  if (active) *reinterpret_cast<uint4*>(out + at) = pack8<T>(v);
}
