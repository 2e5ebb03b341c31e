// ggml's block formats as they lie in a file: levels, scales and minima of a block.
//
// For each kind: `elements` and `bytes` of a block, `group` elements of a scale; level(b, i), at least 0, of element i of
// the block at b; scale(b, g) and minimum(b, g) of its group g. An element is scale * (level - zero) - minimum; where the
// kind has a table, table(level) takes the place of level - zero.
#pragma once

#include "ptx/ptx.cuh"

namespace rvllm::gguf {

__device__ __forceinline__ u32 load16(const u8* p) { return p[0] | static_cast<u32>(p[1]) << 8; }
__device__ __forceinline__ u32 load32(const u8* p) { return load16(p) | load16(p + 2) << 16; }
__device__ __forceinline__ float half_at(const u8* p) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(load16(p))));
}
// Low halves of 16 bytes, then their high ones.
__device__ __forceinline__ u32 nibble(const u8* p, int i) { return i < 16 ? p[i] & 15 : p[i - 16] >> 4; }

// Scale and minimum of group j of Q4_K and Q5_K: six bits each, packed in twelve bytes.
__device__ __forceinline__ u32 six_bit_scale(const u8* s, int j) {
  return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
}
__device__ __forceinline__ u32 six_bit_minimum(const u8* s, int j) {
  return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
}

// Q4_0, Q4_1, Q5_0, Q5_1.
template <bool FIVE, bool MINIMUM>
struct Simple {
  static constexpr bool has_table = false, has_minimum = MINIMUM;
  static constexpr int elements = 32, group = 32, zero = MINIMUM ? 0 : FIVE ? 16 : 8;
  static constexpr int head = MINIMUM ? 4 : 2, bytes = head + (FIVE ? 4 : 0) + 16;
  static __device__ u32 level(const u8* b, int i) {
    const u32 low = nibble(b + head + (FIVE ? 4 : 0), i);
    return FIVE ? low | (load32(b + head) >> i & 1) << 4 : low;
  }
  static __device__ float scale(const u8* b, int) { return half_at(b); }
  static __device__ float minimum(const u8* b, int) { return MINIMUM ? -half_at(b + 2) : 0.f; }
};
using Q4_0 = Simple<false, false>;
using Q4_1 = Simple<false, true>;
using Q5_0 = Simple<true, false>;
using Q5_1 = Simple<true, true>;

struct Q8_0 {
  static constexpr bool has_table = false, has_minimum = false;
  static constexpr int elements = 32, group = 32, zero = 128, bytes = 34;
  static __device__ u32 level(const u8* b, int i) { return b[2 + i] ^ 128; }
  static __device__ float scale(const u8* b, int) { return half_at(b); }
  static __device__ float minimum(const u8*, int) { return 0.f; }
};

// Q4_K, Q5_K: d, dmin, twelve bytes of scales, fifth bits, nibbles.
template <bool FIVE>
struct Super {
  static constexpr bool has_table = false, has_minimum = true;
  static constexpr int elements = 256, group = 32, zero = 0, bytes = FIVE ? 176 : 144;
  static __device__ u32 level(const u8* b, int i) {
    const int j = i / 32, l = i % 32;
    const u32 low = b[(FIVE ? 48 : 16) + j / 2 * 32 + l] >> (j & 1) * 4 & 15;
    return FIVE ? low | (b[16 + l] >> j & 1) << 4 : low;
  }
  static __device__ float scale(const u8* b, int g) { return __fmul_rn(half_at(b), six_bit_scale(b + 4, g)); }
  static __device__ float minimum(const u8* b, int g) { return __fmul_rn(half_at(b + 2), six_bit_minimum(b + 4, g)); }
};
using Q4_K = Super<false>;
using Q5_K = Super<true>;

struct Q6_K {
  static constexpr bool has_table = false, has_minimum = false;
  static constexpr int elements = 256, group = 16, zero = 32, bytes = 210;
  static __device__ u32 level(const u8* b, int i) {
    const int n = i / 128, quarter = i % 128 / 32, l = i % 32;
    const u32 low = b[n * 64 + (quarter & 1) * 32 + l], high = b[128 + n * 32 + l];
    return (quarter < 2 ? low & 15 : low >> 4) | (high >> quarter * 2 & 3) << 4;
  }
  static __device__ float scale(const u8* b, int g) {
    return __fmul_rn(half_at(b + 208), static_cast<signed char>(b[192 + g]));
  }
  static __device__ float minimum(const u8*, int) { return 0.f; }
};

// 16 bytes of (scale, minimum << 4), 64 bytes of levels, d, dmin.
struct Q2_K {
  static constexpr bool has_table = false, has_minimum = true;
  static constexpr int elements = 256, group = 16, zero = 0, bytes = 84;
  static __device__ u32 level(const u8* b, int i) { return b[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3; }
  static __device__ float scale(const u8* b, int g) { return __fmul_rn(half_at(b + 80), b[g] & 15); }
  static __device__ float minimum(const u8* b, int g) { return __fmul_rn(half_at(b + 82), b[g] >> 4); }
};

// 32 bytes of third bits, 64 of two-bit levels, twelve of six-bit scales, d.
struct Q3_K {
  static constexpr bool has_table = false, has_minimum = false;
  static constexpr int elements = 256, group = 16, zero = 4, bytes = 110;
  static __device__ u32 level(const u8* b, int i) {
    const int run = i / 32, l = i % 32;
    return (b[32 + run / 4 * 32 + l] >> run % 4 * 2 & 3) | (b[l] >> run & 1) << 2;
  }
  static __device__ float scale(const u8* b, int g) {
    const u8* const s = b + 96;
    const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> g / 4 * 2 & 3;
    return __fmul_rn(half_at(b + 108), (low | high << 4) - 32);
  }
  static __device__ float minimum(const u8*, int) { return 0.f; }
};

// What levels of IQ4_NL and IQ4_XS stand for.
__device__ __forceinline__ int normal_table(u32 level) {
  constexpr signed char TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return TABLE[level];
}

struct IQ4_NL {
  static constexpr bool has_table = true, has_minimum = false;
  static constexpr int elements = 32, group = 32, zero = 0, bytes = 18;
  static __device__ u32 level(const u8* b, int i) { return nibble(b + 2, i); }
  static __device__ int table(u32 level) { return normal_table(level); }
  static __device__ float scale(const u8* b, int) { return half_at(b); }
  static __device__ float minimum(const u8*, int) { return 0.f; }
};

// d, sixteen upper and 32 lower bits of scales, nibbles.
struct IQ4_XS {
  static constexpr bool has_table = true, has_minimum = false;
  static constexpr int elements = 256, group = 32, zero = 0, bytes = 136;
  static __device__ u32 level(const u8* b, int i) { return nibble(b + 8 + i / 32 * 16, i % 32); }
  static __device__ int table(u32 level) { return normal_table(level); }
  static __device__ float scale(const u8* b, int g) {
    const int low = b[4 + g / 2] >> g % 2 * 4 & 15, high = load16(b + 2) >> 2 * g & 3;
    return __fmul_rn(half_at(b), (low | high << 4) - 32);
  }
  static __device__ float minimum(const u8*, int) { return 0.f; }
};

// The exponent e of a power of two, 2^(e - 128), and nibbles: places in a table of twice the numbers of FP4 (e2m1).
struct MXFP4 {
  static constexpr bool has_table = true, has_minimum = false;
  static constexpr int elements = 32, group = 32, zero = 0, bytes = 17;
  static __device__ u32 level(const u8* b, int i) { return nibble(b + 1, i); }
  static __device__ int table(u32 level) {
    constexpr signed char TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    return TABLE[level];
  }
  static __device__ float scale(const u8* b, int) { return ldexpf(1.f, b[0] - 128); }
  static __device__ float minimum(const u8*, int) { return 0.f; }
};

// Element i of the block at b; each rounding as in ggml's own reference.
template <class B>
__device__ __forceinline__ float element(const u8* b, int i) {
  const u32 level = B::level(b, i);
  int value;
  if constexpr (B::has_table)
    value = B::table(level);
  else
    value = static_cast<int>(level) - B::zero;
  const float number = __fmul_rn(static_cast<float>(value), B::scale(b, i / B::group));
  return B::has_minimum ? __fsub_rn(number, B::minimum(b, i / B::group)) : number;
}

}  // namespace rvllm::gguf
