// ggml's block formats to plain elements, on the way in from a file.
#include "common/common.cuh"

enum Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

template <Format F> struct Block {
  static constexpr int elements = F == Q4_K || F == Q5_K || F == Q6_K ? 256 : F <= BF16 ? 1 : 32;
  static constexpr int bytes = F == F32 ? 4 : F == F16 || F == BF16 ? 2 : F == Q4_0 ? 18 : F == Q4_1 ? 20
                             : F == Q5_0 ? 22 : F == Q5_1 ? 24 : F == Q8_0 ? 34 : F == Q4_K ? 144 : F == Q5_K ? 176 : 210;
};

__device__ __forceinline__ u32 load16(const u8* p) { return p[0] | (u32)p[1] << 8; }
__device__ __forceinline__ u32 load32(const u8* p) { return load16(p) | load16(p + 2) << 16; }
__device__ __forceinline__ float half_at(const u8* p) { return __half2float(__ushort_as_half((u16)load16(p))); }

// Scale and minimum of sub-block j of a K-quant: six bits each, packed in twelve bytes.
__device__ __forceinline__ void scale_min(const u8* s, int j, int& scale, int& minimum) {
  if (j < 4) {
    scale = s[j] & 63;
    minimum = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    minimum = s[j + 4] >> 4 | (s[j] >> 6) << 4;
  }
}

// Element i of the block at b; each rounding as in ggml's own reference.
template <Format F> __device__ __forceinline__ float element(const u8* b, int i) {
  if (F == F32) return __uint_as_float(load32(b));
  if (F == F16) return half_at(b);
  if (F == BF16) return __uint_as_float(load16(b) << 16);
  if (F == Q8_0) return __fmul_rn((float)(signed char)b[2 + i], half_at(b));
  if (F == Q4_0 || F == Q4_1 || F == Q5_0 || F == Q5_1) {
    const bool five = F == Q5_0 || F == Q5_1, minimum = F == Q4_1 || F == Q5_1;
    const u8* const low = b + (minimum ? 4 : 2) + (five ? 4 : 0);
    int q = i < 16 ? low[i] & 15 : low[i - 16] >> 4;
    if (five) q |= (load32(low - 4) >> i & 1) << 4;
    if (!minimum) return __fmul_rn((float)(q - (five ? 16 : 8)), half_at(b));
    return __fadd_rn(__fmul_rn((float)q, half_at(b)), half_at(b + 2));
  }
  if (F == Q4_K || F == Q5_K) {
    const int j = i / 32, l = i % 32;
    int scale, minimum;
    scale_min(b + 4, j, scale, minimum);
    const u8* const low = b + 16 + (F == Q5_K ? 32 : 0);
    int q = low[j / 2 * 32 + l] >> (j & 1) * 4 & 15;
    if (F == Q5_K) q |= (b[16 + l] >> j & 1) << 4;
    return __fsub_rn(__fmul_rn(__fmul_rn(half_at(b), (float)scale), (float)q), __fmul_rn(half_at(b + 2), (float)minimum));
  }
  const int n = i / 128, r = i % 128, quarter = r / 32, l = r % 32;  // Q6_K
  const u8 low = b[n * 64 + (quarter & 1) * 32 + l], high = b[128 + n * 32 + l];
  const int q = ((quarter < 2 ? low & 15 : low >> 4) | (high >> quarter * 2 & 3) << 4) - 32;
  const float scale = (float)(signed char)b[192 + n * 8 + quarter * 2 + l / 16];
  return __fmul_rn(__fmul_rn(half_at(b + 208), scale), (float)q);
}

// out [n] from n / Block::elements blocks at `blocks`; n % 8 == 0. Eight elements a thread.
// Grid: ceil(n / 8 / threads). Bound by the copy from the host that comes before it.
template <Format F, typename OUT>
__global__ void dequant(OUT* __restrict__ out, const u8* __restrict__ blocks, size_t n) {
  const size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * 8;
  if (i >= n) return;
  float x[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    constexpr int E = Block<F>::elements;
    const size_t at = i + j;
    x[j] = element<F>(blocks + at / E * Block<F>::bytes, (int)(at % E));
  }
  if constexpr (sizeof(OUT) == 4) {
    reinterpret_cast<float4*>(out + i)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(out + i)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<uint4*>(out + i) = pack8<OUT>(x);
  }
}
