// ggml's block formats and plain numbers to plain elements, on the way in from a file.
#include "common/common.cuh"
#include "loading/gguf.cuh"

using namespace rvllm::gguf;

template <typename T> struct Plain {
  static constexpr int elements = 1, bytes = sizeof(T);
};
using F32 = Plain<float>;
using F16 = Plain<f16>;
using BF16 = Plain<bf16>;
template <> __device__ __forceinline__ float rvllm::gguf::element<F32>(const u8* b, int) { return __uint_as_float(load32(b)); }
template <> __device__ __forceinline__ float rvllm::gguf::element<F16>(const u8* b, int) { return half_at(b); }
template <> __device__ __forceinline__ float rvllm::gguf::element<BF16>(const u8* b, int) { return __uint_as_float(load16(b) << 16); }

// out [n] from n / B::elements blocks at `blocks`; n % 8 == 0. Eight elements a thread.
// Grid: ceil(n / 8 / threads). Bound by the copy from the host that comes before it.
template <typename B, typename OUT>
__global__ void dequant(OUT* __restrict__ out, const u8* __restrict__ blocks, size_t n) {
  const size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * 8;
  if (i >= n) return;
  float x[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    constexpr int E = B::elements;
    const size_t at = i + j;
    x[j] = element<B>(blocks + at / E * B::bytes, (int)(at % E));
  }
  if constexpr (sizeof(OUT) == 4) {
    reinterpret_cast<float4*>(out + i)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(out + i)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<uint4*>(out + i) = pack8<OUT>(x);
  }
}
