// bfloat16 and half for the host: the names of cuda_bf16.h and cuda_fp16.h that kernels here use, rounding to the
// nearest even. Arithmetic goes through float, whose 24 bits make one rounded operation exact to the last bit.
#pragma once

#include <math.h>
#include <string.h>

struct alignas(8) float2;

namespace emu {
inline unsigned bits(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline unsigned short to_bf16(float x) {
  const unsigned u = bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // as the hardware: one NaN for all
  return static_cast<unsigned short>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(unsigned short v) { return as_float(static_cast<unsigned>(v) << 16); }
inline unsigned short to_f16(float x) {
  if (x != x) return 0x7fff;
  const _Float16 h = static_cast<_Float16>(x);
  unsigned short v;
  memcpy(&v, &h, 2);
  return v;
}
inline float from_f16(unsigned short v) {
  _Float16 h;
  memcpy(&h, &v, 2);
  return static_cast<float>(h);
}
}  // namespace emu

#define EMU_SIXTEEN(TYPE, PAIR, TO, FROM)                                                                \
  struct TYPE {                                                                                          \
    unsigned short raw;                                                                                  \
    TYPE() = default;                                                                                    \
    TYPE(float x) : raw(emu::TO(x)) {}                                                                   \
    TYPE(double x) : raw(emu::TO(static_cast<float>(x))) {}                                              \
    TYPE(int x) : raw(emu::TO(static_cast<float>(x))) {}                                                 \
    operator float() const { return emu::FROM(raw); }                                                    \
  };                                                                                                     \
  inline TYPE operator+(TYPE a, TYPE b) { return TYPE(float(a) + float(b)); }                            \
  inline TYPE operator-(TYPE a, TYPE b) { return TYPE(float(a) - float(b)); }                            \
  inline TYPE operator*(TYPE a, TYPE b) { return TYPE(float(a) * float(b)); }                            \
  inline TYPE operator/(TYPE a, TYPE b) { return TYPE(float(a) / float(b)); }                            \
  inline TYPE operator-(TYPE a) { return TYPE(-float(a)); }                                              \
  inline bool operator==(TYPE a, TYPE b) { return float(a) == float(b); }                                \
  inline bool operator!=(TYPE a, TYPE b) { return float(a) != float(b); }                                \
  inline bool operator<(TYPE a, TYPE b) { return float(a) < float(b); }                                  \
  inline bool operator>(TYPE a, TYPE b) { return float(a) > float(b); }                                  \
  inline bool operator<=(TYPE a, TYPE b) { return float(a) <= float(b); }                                \
  inline bool operator>=(TYPE a, TYPE b) { return float(a) >= float(b); }                                \
  inline TYPE __hadd(TYPE a, TYPE b) { return a + b; }                                                   \
  inline TYPE __hsub(TYPE a, TYPE b) { return a - b; }                                                   \
  inline TYPE __hmul(TYPE a, TYPE b) { return a * b; }                                                   \
  inline TYPE __hfma(TYPE a, TYPE b, TYPE c) { return TYPE(fma((double)float(a), (double)float(b), (double)float(c))); } \
  inline TYPE __hmax(TYPE a, TYPE b) { return TYPE(fmaxf(a, b)); }                                       \
  inline TYPE __hmin(TYPE a, TYPE b) { return TYPE(fminf(a, b)); }                                       \
  inline TYPE __habs(TYPE a) { return TYPE(fabsf(a)); }                                                  \
  inline bool __hisnan(TYPE a) { return float(a) != float(a); }                                          \
  struct alignas(4) PAIR {                                                                               \
    TYPE x, y;                                                                                           \
  };                                                                                                     \
  inline PAIR __hadd2(PAIR a, PAIR b) { return {a.x + b.x, a.y + b.y}; }                                 \
  inline PAIR __hsub2(PAIR a, PAIR b) { return {a.x - b.x, a.y - b.y}; }                                 \
  inline PAIR __hmul2(PAIR a, PAIR b) { return {a.x * b.x, a.y * b.y}; }                                 \
  inline PAIR __hfma2(PAIR a, PAIR b, PAIR c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline PAIR __halves2(TYPE a, TYPE b) { return {a, b}; }                                               \
  inline float __low2float(PAIR a) { return a.x; }                                                       \
  inline float __high2float(PAIR a) { return a.y; }

EMU_SIXTEEN(__nv_bfloat16, __nv_bfloat162, to_bf16, from_bf16)
EMU_SIXTEEN(__half, __half2, to_f16, from_f16)
#undef EMU_SIXTEEN
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.raw; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) {
  __nv_bfloat16 x;
  x.raw = v;
  return x;
}
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline unsigned short __half_as_ushort(__half x) { return x.raw; }
inline __half __ushort_as_half(unsigned short v) {
  __half x;
  x.raw = v;
  return x;
}
