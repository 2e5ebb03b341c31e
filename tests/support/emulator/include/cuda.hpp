// The CUDA C++ that kernels here use, for g++: keywords, vector types, intrinsics, atomics, warp operations.
// What is missing fails to compile by its own name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "launch.hpp"
#include "half.hpp"

#define __CUDA_ARCH__ 800
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __constant__ static
#define __shared__ static __attribute__((section("emu_shared")))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define warpSize 32

#define threadIdx (emu::current->thread)
#define blockIdx (emu::state.block)
#define blockDim (emu::state.block_dim)
#define gridDim (emu::state.grid_dim)

// ---- vector types
#define EMU_VECTORS(T, N, A)                                                           \
  struct N##1 { T x; };                                                                \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };                                      \
  struct alignas(A) N##4 { T x, y, z, w; };                                            \
  inline N##1 make_##N##1(T x) { return {x}; }                                         \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                 \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char, 4)
EMU_VECTORS(unsigned char, uchar, 4)
EMU_VECTORS(short, short, 8)
EMU_VECTORS(unsigned short, ushort, 8)
EMU_VECTORS(int, int, 16)
EMU_VECTORS(unsigned int, uint, 16)
EMU_VECTORS(float, float, 16)
EMU_VECTORS(long long, longlong, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16)
EMU_VECTORS(double, double, 16)
#undef EMU_VECTORS
struct int3 { int x, y, z; };
struct float3 { float x, y, z; };
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }

// ---- integers
#define EMU_MIN_MAX(A, B, R)                                          \
  inline R min(A a, B b) { return (R)b < (R)a ? (R)b : (R)a; }        \
  inline R max(A a, B b) { return (R)a < (R)b ? (R)b : (R)a; }
EMU_MIN_MAX(int, int, int)
EMU_MIN_MAX(unsigned, unsigned, unsigned)
EMU_MIN_MAX(int, unsigned, unsigned)
EMU_MIN_MAX(unsigned, int, unsigned)
EMU_MIN_MAX(long, long, long)
EMU_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMU_MIN_MAX(long, unsigned long, unsigned long)
EMU_MIN_MAX(unsigned long, long, unsigned long)
EMU_MIN_MAX(long long, long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMU_MIN_MAX(long long, unsigned long long, unsigned long long)
EMU_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const unsigned long long all = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned pick = s >> 4 * i & 15;
    unsigned byte = (unsigned)(all >> 8 * (pick & 7) & 255);
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned s) {
  s &= 31;
  return s ? high << s | low >> (32 - s) : high;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned s) {
  s &= 31;
  return s ? low >> s | high << (32 - s) : low;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
  return c;
}

// ---- floats; -ffp-contract=off keeps products and sums apart
inline float __int_as_float(int x) { return emu::as_float((unsigned)x); }
inline float __uint_as_float(unsigned x) { return emu::as_float(x); }
inline int __float_as_int(float x) { return (int)emu::bits(x); }
inline unsigned __float_as_uint(float x) { return emu::bits(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return (float)(1. / sqrt((double)a)); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.f ? (a < 1.f ? a : 1.f) : 0.f; }
inline float rsqrtf(float a) { return (float)(1. / sqrt((double)a)); }
inline double rsqrt(double a) { return 1. / sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __double2float_rn(double x) { return (float)x; }
inline float __double2float_ru(double x) {
  const float f = (float)x;
  return (double)f < x ? nextafterf(f, INFINITY) : f;
}
inline float __double2float_rd(double x) {
  const float f = (float)x;
  return (double)f > x ? nextafterf(f, -INFINITY) : f;
}
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
namespace emu {
inline float fast_exp(float x) { return expf(x); }
inline float fast_log(float x) { return logf(x); }
inline float fast_log2(float x) { return log2f(x); }
inline float fast_log10(float x) { return log10f(x); }
inline float fast_exp10(float x) { return powf(10.f, x); }
inline float fast_sin(float x) { return sinf(x); }
inline float fast_cos(float x) { return cosf(x); }
inline float fast_tan(float x) { return tanf(x); }
inline float fast_pow(float x, float y) { return powf(x, y); }
}  // namespace emu
// glibc's headers declare these names for themselves.
#define __expf(x) emu::fast_exp(x)
#define __logf(x) emu::fast_log(x)
#define __log2f(x) emu::fast_log2(x)
#define __log10f(x) emu::fast_log10(x)
#define __exp10f(x) emu::fast_exp10(x)
#define __sinf(x) emu::fast_sin(x)
#define __cosf(x) emu::fast_cos(x)
#define __tanf(x) emu::fast_tan(x)
#define __powf(x, y) emu::fast_pow(x, y)

// ---- memory
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcv(const T* p) { return *p; }
template <class T> inline T __ldlu(const T* p) { return *p; }
template <class T, class V> inline void __stcg(T* p, V v) { *p = v; }
template <class T, class V> inline void __stcs(T* p, V v) { *p = v; }
template <class T, class V> inline void __stwb(T* p, V v) { *p = v; }
template <class T, class V> inline void __stwt(T* p, V v) { *p = v; }
inline uint32_t __cvta_generic_to_shared(const void* p) { return emu::shared_address(p); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
#define __trap() EMU_FAIL("__trap() in line %d", __LINE__)
#define __builtin_assume(x)

#define EMU_ATOMIC(NAME, NEW)                                        \
  template <class T, class V> inline T NAME(T* p, V value) {         \
    const T old = *p, v = static_cast<T>(value);                     \
    *p = (NEW);                                                      \
    return old;                                                      \
  }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicMax, old < v ? v : old)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef EMU_ATOMIC
template <class T, class V, class W> inline T atomicCAS(T* p, V compare, W value) {
  const T old = *p;
  if (old == static_cast<T>(compare)) *p = static_cast<T>(value);
  return old;
}

// ---- the block
#define __syncthreads() emu::sync_threads(__LINE__)
namespace emu {
inline int sync_with(int line, int predicate, int which) {
  sync_threads(line, predicate);
  return state.barriers[0].result[which];
}
}  // namespace emu
#define __syncthreads_count(p) emu::sync_with(__LINE__, p, 0)
#define __syncthreads_and(p) emu::sync_with(__LINE__, p, 1)
#define __syncthreads_or(p) emu::sync_with(__LINE__, p, 2)

// ---- the warp
namespace emu {
inline void nothing(Fiber*, u32) {}
inline u32 here() { return current->id % 32; }

// in[0]: the lane to read from; in[1], in[2]: the value.
inline void shuffle(Fiber* lanes, u32 mask) {
  for (u32 i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    const u32 from = lanes[i].in[0];
    const bool there = mask >> from & 1;  // a value from a lane that takes no part is undefined
    lanes[i].out[0] = there ? lanes[from].in[1] : ~0u;
    lanes[i].out[1] = there ? lanes[from].in[2] : ~0u;
  }
}
template <class T> inline T shuffled(u32 mask, T value, u32 from, const char* name) {
  static_assert(sizeof(T) <= 8, "values of up to eight bytes can be shuffled");
  Fiber* const f = current;
  f->in[0] = from;
  f->in[2] = 0;
  memcpy(&f->in[1], &value, sizeof(T));
  together(mask, shuffle, name);
  memcpy(static_cast<void*>(&value), f->out, sizeof(T));
  return value;
}
template <class Combine> inline void reduce(Fiber* lanes, u32 mask, Combine combine) {
  u32 value = 0;
  bool first = true;
  for (u32 i = 0; i < 32; i++)
    if (mask >> i & 1) {
      value = first ? lanes[i].in[0] : combine(value, lanes[i].in[0]);
      first = false;
    }
  for (u32 i = 0; i < 32; i++)
    if (mask >> i & 1) lanes[i].out[0] = value;
}
inline void ballot(Fiber* lanes, u32 mask) {
  u32 votes = 0;
  for (u32 i = 0; i < 32; i++)
    if (mask >> i & 1 && lanes[i].in[0]) votes |= 1u << i;
  for (u32 i = 0; i < 32; i++)
    if (mask >> i & 1) lanes[i].out[0] = votes;
}
inline void match(Fiber* lanes, u32 mask) {
  for (u32 i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    u32 same = 0;
    for (u32 j = 0; j < 32; j++)
      if (mask >> j & 1 && lanes[j].in[0] == lanes[i].in[0] && lanes[j].in[1] == lanes[i].in[1]) same |= 1u << j;
    lanes[i].out[0] = same;
  }
}
inline u32 asked(u32 mask, u32 value, Complete operation, const char* name) {
  current->in[0] = value;
  together(mask, operation, name);
  return current->out[0];
}
#define EMU_REDUCE(NAME, T, EXPRESSION)                                           \
  inline void NAME(Fiber* lanes, u32 mask) {                                      \
    reduce(lanes, mask, [](u32 p, u32 q) {                                        \
      const T a = (T)p, b = (T)q;                                                 \
      return (u32)(EXPRESSION);                                                   \
    });                                                                           \
  }
EMU_REDUCE(reduce_add, u32, a + b)
EMU_REDUCE(reduce_and, u32, a & b)
EMU_REDUCE(reduce_or, u32, a | b)
EMU_REDUCE(reduce_xor, u32, a ^ b)
EMU_REDUCE(reduce_min, int, b < a ? b : a)
EMU_REDUCE(reduce_max, int, a < b ? b : a)
EMU_REDUCE(reduce_umin, u32, b < a ? b : a)
EMU_REDUCE(reduce_umax, u32, a < b ? b : a)
#undef EMU_REDUCE
}  // namespace emu

inline void __syncwarp(unsigned mask = ~0u) { emu::together(mask, emu::nothing, "__syncwarp"); }
template <class T> inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  const int lane = emu::here();
  return emu::shuffled(mask, v, (lane & -width) + (from & (width - 1)), "__shfl_sync");
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) {
  const int lane = emu::here(), from = lane ^ by;
  return emu::shuffled(mask, v, (from & -width) <= (lane & -width) ? from : lane, "__shfl_xor_sync");
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int lane = emu::here(), from = lane - (int)by;
  return emu::shuffled(mask, v, from < (lane & -width) ? lane : from, "__shfl_up_sync");
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int lane = emu::here(), from = lane + (int)by;
  return emu::shuffled(mask, v, from >= (lane & -width) + width ? lane : from, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emu::asked(mask, p != 0, emu::ballot, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int p) { return emu::asked(mask, p != 0, emu::ballot, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int p) { return emu::asked(mask, p == 0, emu::ballot, "__all_sync") == 0; }
inline unsigned __activemask() {
  const emu::Warp& warp = emu::state.warps[emu::current->id / 32];
  return warp.exists & ~warp.ended;
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T v) {
  static_assert(sizeof(T) <= 8, "values of up to eight bytes can be matched");
  emu::current->in[0] = emu::current->in[1] = 0;
  memcpy(emu::current->in, &v, sizeof(T));
  emu::together(mask, emu::match, "__match_any_sync");
  return emu::current->out[0];
}
inline unsigned __reduce_add_sync(unsigned m, unsigned v) { return emu::asked(m, v, emu::reduce_add, "__reduce_add_sync"); }
inline int __reduce_add_sync(unsigned m, int v) { return (int)emu::asked(m, (unsigned)v, emu::reduce_add, "__reduce_add_sync"); }
inline unsigned __reduce_and_sync(unsigned m, unsigned v) { return emu::asked(m, v, emu::reduce_and, "__reduce_and_sync"); }
inline unsigned __reduce_or_sync(unsigned m, unsigned v) { return emu::asked(m, v, emu::reduce_or, "__reduce_or_sync"); }
inline unsigned __reduce_xor_sync(unsigned m, unsigned v) { return emu::asked(m, v, emu::reduce_xor, "__reduce_xor_sync"); }
inline int __reduce_min_sync(unsigned m, int v) { return (int)emu::asked(m, (unsigned)v, emu::reduce_min, "__reduce_min_sync"); }
inline int __reduce_max_sync(unsigned m, int v) { return (int)emu::asked(m, (unsigned)v, emu::reduce_max, "__reduce_max_sync"); }
inline unsigned __reduce_min_sync(unsigned m, unsigned v) { return emu::asked(m, v, emu::reduce_umin, "__reduce_min_sync"); }
inline unsigned __reduce_max_sync(unsigned m, unsigned v) { return emu::asked(m, v, emu::reduce_umax, "__reduce_max_sync"); }
