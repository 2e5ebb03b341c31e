// The weighted sum of what a token's experts gave it, and the norm behind it.
#include "moe/moe.cuh"
#include "rowwise/row_norm.cuh"

namespace rvllm::experts {

// x[t] += scale * weighted_parts of token t, then out = the RMS norm of x: the bits of `combine` (moe/one_token.cu) and then
// `norm` with an add (rowwise/norm.cu).
// out, x [rows, width]; weight float32 [width]. Rows from *num_tokens on are left alone.
// Grid: (rows). Block: a 16-byte vector a thread. Bound by memory.
template <class T>
__global__ void __launch_bounds__(1024)
    combine_norm(T* out, T* x, const T* parts, const float* shares, const float* __restrict__ weight, const int* num_tokens,
                 const int* places, int top_k, int width, float scale, float eps) {
  const int token = blockIdx.x;
  if (token >= *num_tokens) return;
  uint4* const target = reinterpret_cast<uint4*>(out + static_cast<size_t>(token) * width);
  const auto addend = [&](int i, float(&a)[8]) {
    const auto value = weighted_parts(parts, shares, places, token, top_k, width, 8 * i);
#pragma unroll
    for (int j = 0; j < 8; j++) a[j] = gemm::to_float(value.v[j]);
  };
  norm_row<T, false, true, 1>(x, addend, weight, nullptr, width, eps, scale, [&](int i, bool in, const float(&v)[8]) {
    if (in) target[i] = pack8<T>(v);
  });
}

}  // namespace rvllm::experts
