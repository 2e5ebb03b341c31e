// Activation functions, plain and gated, where a matrix kernel has not applied them already.
#include "common/activations.cuh"
#include "common/common.cuh"

// GATED: out[r, c] = act(x[r, c]) * x[r, width + c], x [rows, 2 * width]; otherwise out = act(x), x [rows, width].
// width % 8 == 0. Grid: (ceil(width / 8 / threads), rows). Bound by memory.
template <typename T, Act A, bool GATED>
__global__ void activate(T* out, const T* x, int width) {
  griddep_launch();
  griddep_wait();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= width / 8) return;
  const uint4* const row = reinterpret_cast<const uint4*>(x + (size_t)blockIdx.y * width * (GATED ? 2 : 1));
  float a[8], b[8];
  unpack8<T>(row[i], a);
  if (GATED) unpack8<T>(row[width / 8 + i], b);
#pragma unroll
  for (int j = 0; j < 8; j++) a[j] = __fmul_rn(activated<A>(a[j]), GATED ? b[j] : 1.f);
  reinterpret_cast<uint4*>(out + (size_t)blockIdx.y * width)[i] = pack8<T>(a);
}

// out = clamped_gate(x[:, :width], x[:, width:]); limit 0: none. The rest as above.
template <typename T>
__global__ void clamped(T* out, const T* x, int width, float limit, float alpha) {
  griddep_launch();
  griddep_wait();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= width / 8) return;
  const uint4* const row = reinterpret_cast<const uint4*>(x + (size_t)blockIdx.y * width * 2);
  float g[8], u[8];
  unpack8<T>(row[i], g);
  unpack8<T>(row[width / 8 + i], u);
#pragma unroll
  for (int j = 0; j < 8; j++) g[j] = clamped_gate(g[j], u[j], limit, alpha);
  reinterpret_cast<uint4*>(out + (size_t)blockIdx.y * width)[i] = pack8<T>(g);
}
