// Row gather and the residual add.
#include "common/common.cuh"

// out[s] = x[rows[s]], and the same of another pair where other_width is not 0. out [samples, width], x [T, width],
// width % 8 == 0; count: samples in use. Grid: (samples), any number of threads. Bound by latency.
template <typename T>
__global__ void gather_rows(T* __restrict__ out, const T* __restrict__ x, const int* rows, const int* count, int width,
                            T* __restrict__ other_out, const T* __restrict__ other, int other_width) {
  griddep_launch();
  const int row = rows[blockIdx.x];
  const bool wanted = (int)blockIdx.x < *count;
  griddep_wait();
  if (!wanted) return;
  const uint4* const source = reinterpret_cast<const uint4*>(x + (size_t)row * width);
  uint4* const target = reinterpret_cast<uint4*>(out + (size_t)blockIdx.x * width);
  const uint4* const other_source = reinterpret_cast<const uint4*>(other + (size_t)row * other_width);
  uint4* const other_target = reinterpret_cast<uint4*>(other_out + (size_t)blockIdx.x * other_width);
  for (int i = threadIdx.x; i < max(width, other_width) / 8; i += blockDim.x) {
    if (i < width / 8) target[i] = source[i];
    if (i < other_width / 8) other_target[i] = other_source[i];
  }
}

// x += y * scale over n elements, n % 8 == 0, rounded once. Grid: any. Bound by memory.
template <typename T>
__global__ void add(T* __restrict__ x, const T* __restrict__ y, size_t n, float scale) {
  griddep_launch();
  griddep_wait();
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n / 8; i += step) {
    float a[8], b[8];
    unpack8<T>(reinterpret_cast<const uint4*>(x)[i], a);
    unpack8<T>(reinterpret_cast<const uint4*>(y)[i], b);
#pragma unroll
    for (int j = 0; j < 8; j++) a[j] = fmaf(b[j], scale, a[j]);
    reinterpret_cast<uint4*>(x)[i] = pack8<T>(a);
  }
}
