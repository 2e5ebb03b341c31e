// Activation functions, plain and gated, where a matrix kernel has not applied them already.
#include "common.cuh"

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2 };

template <Activation A> __device__ __forceinline__ float activated(float x) {
  if (A == SILU) return x / (1.f + __expf(-x));
  if (A == GELU) return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
  if (A == GELU_TANH) return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  const float r = fmaxf(x, 0.f);
  return A == RELU ? r : r * r;
}

// GATED: out[r, c] = act(x[r, c]) * x[r, width + c], x [rows, 2 * width]; otherwise out = act(x), x [rows, width].
// width % 8 == 0. Grid: (ceil(width / 8 / threads), rows). Bound by memory.
template <typename T, Activation A, bool GATED>
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
  for (int j = 0; j < 8; j++) a[j] = activated<A>(a[j]) * (GATED ? b[j] : 1.f);
  reinterpret_cast<uint4*>(out + (size_t)blockIdx.y * width)[i] = pack8<T>(a);
}
