// Integer weights as the kernels of this folder read them, and their way into registers of the tensor cores.
//
// A matrix is cut into chunks of 64 rows x 128 columns, the chunks of 64 rows one behind the other along K. A chunk is
//
//   scales  runs of 64 words, a word a row; a run for each group of columns (or pair of groups, see PAIRS)
//   levels  two units of 64 columns, each a few planes of 128 shares: thread t of 128 has share t of each plane
//
// Thread t has the elements that it holds as wgmma's (or mma's) first operand: of each step of 16 columns eight, place i
// of them in register i % 4, in its low half where i < 4. A unit is four steps. Planes of a unit, `j` a step:
//
//   4 bits  16 bytes a thread: place i of step j in nibble i of word j
//   8 bits  two planes of 16 bytes: byte b of word j of plane h is place 2 b + h
//   1 bit   4 bytes: bit 8 b + 2 j + h is place 2 b + h of step j
//   2 bits  8 bytes: the bits from 8 b + 4 (j % 2) + 2 h on of word j / 2, likewise
// Levels of 5 bits are a plane of 4 and one of 1, of 6 bits of 4 and 2, of 3 bits of 2 and 1.
//
// Two arithmetics:
//   integers  the product is of level - zero, exact in 16 bits; a group's sum is multiplied by its scale in float32.
//             A scale's word: float16 scale, and the 16-bit number MAGIC + zero above it (8 bits: the zero).
//   numbers   the product is of round16(level * scale - minimum), in float32 before it is rounded. A scale's word: scale
//             and minimum as float16, or with PAIRS the scales of two groups of 16.
#pragma once

#include "gemm/gemm.cuh"

namespace rvllm::gemm {

inline constexpr int CHUNK_K = 128;  // columns of a chunk
inline constexpr u32 FLOAT_128 = 0x43000000, FLOAT_2_23 = 0x4B000000;

template <class T>
struct Half2;
template <>
struct Half2<bf16> {
  static constexpr u32 MAGIC = 0x43004300;  // 128 twice; a nibble in the low bits of each adds its value
  static __device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 d;
#if __CUDA_ARCH__ >= 900
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else  // no subtraction there; the product with -1 is exact, so that this one rounds as it does
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80), "r"(a));
#endif
    return d;
  }
  static __device__ __forceinline__ u32 rounded(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
};
template <>
struct Half2<f16> {
  static constexpr u32 MAGIC = 0x64006400;  // 1024
  static __device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ __forceinline__ u32 rounded(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
  }
};

__device__ __forceinline__ u32 masked_or(u32 v, u32 mask, u32 bits) { return (v & mask) | bits; }
// A constant that stays in a register: an instruction has room for one, and would get another by a move each time.
__device__ __forceinline__ u32 kept_constant(u32 value) { return value + (blockDim.y >> 8); }  // plus 0
__device__ __forceinline__ float low_half(u32 word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
}
__device__ __forceinline__ float high_half(u32 word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
__device__ __forceinline__ u32 shared_word(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ void shared_words(u32 at, u32 (&w)[4]) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(at));
}
__device__ __forceinline__ void shared_words(u32 at, u32 (&w)[2]) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at));
}
__device__ __forceinline__ void shared_words(u32 at, u32 (&w)[1]) { w[0] = shared_word(at); }

// A fragment's registers of two words of four bytes each: `even` has rows `row`, `odd` rows row + 8.
template <class T, class Value>
__device__ __forceinline__ void fragment(u32 (&a)[4], u32 even, u32 odd, Value value) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int b = i / 2;  // the byte of the low half; the high one's is two further
    const u32 word = i % 2 ? odd : even;
    a[i] = Half2<T>::rounded(value(word, b, i % 2), value(word, b + 2, i % 2));
  }
}

// ---------------------------------------------------------------- integers
// BITS 4 or 8; GROUP 32, 64 or 128 columns.
template <int BITS, int GROUP>
struct Integers {
  static constexpr bool INTEGERS = true;
  static constexpr int RUNS = CHUNK_K / GROUP, SCALES = RUNS * 256, UNIT = BITS * 512, CHUNK = SCALES + 2 * UNIT;
  static constexpr int STEPS = GROUP < 64 ? GROUP / 16 : 4;  // of a unit that share a scale

  static __device__ __forceinline__ u32 run_at(u32 at, int u, int j) { return at + (u * 64 + j * 16) / GROUP * 256; }

  // Steps u of the chunk at `at`, for thread t whose rows are `row` and row + 8 -> a, its four fragments.
  template <class T>
  static __device__ __forceinline__ void decode(u32 (&a)[4][4], u32 at, int u, int thread, int row) {
    const u32 planes = at + SCALES + u * UNIT + thread * 16;
    const u32 mask = kept_constant(0x000f000f);
    u32 first[4], second[4], zero[2];
    shared_words(planes, first);
    if constexpr (BITS == 8) shared_words(planes + 2048, second);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j % STEPS == 0) {
        const u32 run = run_at(at, u, j) + 4 * row;
#pragma unroll
        for (int r = 0; r < 2; r++) zero[r] = __byte_perm(shared_word(run + 32 * r), 0, 0x3232);
      }
      if constexpr (BITS == 4) {
#pragma unroll
        for (int i = 0; i < 4; i++)
          a[j][i] = Half2<T>::minus(masked_or(first[j] >> 4 * i, mask, Half2<T>::MAGIC), zero[i & 1]);
      } else {  // the zero is a plain number
        const float less[2] = {-8388608.f - low_half(zero[0]), -8388608.f - low_half(zero[1])};
        fragment<T>(a[j], first[j], second[j], [&](u32 word, int b, int r) {
          return __uint_as_float(__byte_perm(word, FLOAT_2_23, 0x7440 | b)) + less[r];
        });
      }
    }
  }
};

// ---------------------------------------------------------------- numbers
// BITS of a level, GROUP columns of a scale; TABLE: 4-bit levels are places in a table of signed bytes.
enum Table { NONE, NORMAL, MX };
template <int BITS, int GROUP, bool PAIRS, Table TABLE = NONE>
struct Numbers {
  static constexpr bool INTEGERS = false;
  static constexpr int RUN = PAIRS ? 2 * GROUP : GROUP;  // columns of a run of scales
  static constexpr int RUNS = CHUNK_K / RUN, SCALES = RUNS * 256, UNIT = BITS * 512, CHUNK = SCALES + 2 * UNIT;
  static constexpr bool FOUR = BITS >= 4 && BITS < 8, TWO = BITS == 2 || BITS == 3 || BITS == 6, ONE = BITS % 2 == 1;
  static constexpr bool BYTES = BITS == 8 || TABLE != NONE;  // too large to be added to 128 in sixteen bits
  static constexpr int MIDDLE = 1 << (BITS - 1);  // what PAIRS subtract from a level
  static_assert(!(BYTES && PAIRS));

  template <class T>
  static __device__ __forceinline__ void decode(u32 (&a)[4][4], u32 at, int u, int thread, int row) {
    const u32 planes = at + SCALES + u * UNIT;
    u32 low[4], high[4], two[2], one[1];
    if constexpr (FOUR || BITS == 8) shared_words(planes + thread * 16, low);
    if constexpr (BITS == 8) shared_words(planes + 2048 + thread * 16, high);
    if constexpr (TWO) shared_words(planes + (FOUR ? 2048 : 0) + thread * 8, two);
    if constexpr (ONE) shared_words(planes + (FOUR ? 2048 : 1024) + thread * 4, one);
    u32 scales[2];
    float d[2], less[2];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j * 16 % RUN == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) scales[r] = shared_word(at + (u * 64 + j * 16) / RUN * 256 + 4 * row + 32 * r);
      }
      if (j * 16 % GROUP == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          d[r] = PAIRS && j * 16 / GROUP % 2 ? high_half(scales[r]) : low_half(scales[r]);
          // What is added after the multiplication of level + 128, or of the signed byte.
          less[r] = PAIRS ? -(128 + MIDDLE) * d[r] : BYTES ? -high_half(scales[r]) : fmaf(-128.f, d[r], -high_half(scales[r]));
        }
      }
      u32 even, odd;
      if constexpr (TABLE != NONE) {
        looked_up(low[j], even, odd);
      } else {
        levels(j, low, high, two, one, even, odd);
      }
      fragment<T>(a[j], even, odd, [&](u32 word, int b, int r) {
        if constexpr (BYTES) {
          return fmaf(__uint_as_float(__byte_perm(word, FLOAT_2_23, 0x7440 | b)) - 8388736.f, d[r], less[r]);
        } else {
          return fmaf(__uint_as_float(__byte_perm(word, FLOAT_128, 0x7044 | b << 8)), d[r], less[r]);
        }
      });
    }
  }

  // Step j's levels, four a word.
  static __device__ __forceinline__ void levels(int j, const u32 (&low)[4], const u32 (&high)[4], const u32 (&two)[2],
                                                const u32 (&one)[1], u32& even, u32& odd) {
    if constexpr (BITS == 8) {
      even = low[j], odd = high[j];
      return;
    }
    u32 v[2] = {};
    if constexpr (FOUR) v[0] = low[j] & 0x0f0f0f0f, v[1] = low[j] >> 4 & 0x0f0f0f0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if constexpr (TWO) {
        const int from = 2 * (2 * (j % 2) + h), to = FOUR ? 4 : 0;
        const u32 bits = from >= to ? two[j / 2] >> (from - to) : two[j / 2] << (to - from);
        v[h] = masked_or(bits, 0x03030303u << to, v[h]);
      }
      if constexpr (ONE) {
        const int from = 2 * j + h, to = FOUR ? 4 : 2;
        const u32 bits = from >= to ? one[0] >> (from - to) : one[0] << (to - from);
        v[h] = masked_or(bits, 0x01010101u << to, v[h]);
      }
    }
    even = v[0], odd = v[1];
  }

  // The table's entries, plus 128, of eight nibbles. Nibbles 0, 2, 4, 6 are even's bytes 0, 1, 2, 3, the others odd's.
  static __device__ __forceinline__ void looked_up(u32 w, u32& even, u32& odd) {
    constexpr bool NL = TABLE == NORMAL;
    constexpr u32 Q0 = NL ? 0x3f2d1801 : 0x83828180, Q1 = NL ? 0x766a5d4f : 0x8c888684;
    constexpr u32 Q2 = NL ? 0xa6998d81 : 0x7d7e7f80, Q3 = NL ? 0xf1d9c5b5 : 0x74787a7c;
    const u32 place = w & 0x77777777, upper = masked_or(w >> 1, 0x44444444, 0x32103210);
    const auto four = [&](u32 p, u32 u) { return __byte_perm(__byte_perm(Q0, Q1, p), __byte_perm(Q2, Q3, p), u); };
    const u32 first = four(place, upper), second = four(place >> 16, upper >> 16);
    even = __byte_perm(first, second, 0x6420);
    odd = __byte_perm(first, second, 0x7531);
  }
};

using Int4 = Integers<4, 128>;
using Int4G64 = Integers<4, 64>;
using Int4G32 = Integers<4, 32>;
using Int8 = Integers<8, 128>;
using Int8G64 = Integers<8, 64>;
using Int8G32 = Integers<8, 32>;
using Q4 = Numbers<4, 32, false>;        // Q4_0, Q4_1, Q4_K
using Q5 = Numbers<5, 32, false>;        // Q5_0, Q5_1, Q5_K
using Q8 = Numbers<8, 32, false>;        // Q8_0
using Q6 = Numbers<6, 16, true>;         // Q6_K
using Q3 = Numbers<3, 16, true>;         // Q3_K
using Q2 = Numbers<2, 16, false>;        // Q2_K
using NL4 = Numbers<4, 32, false, NORMAL>;  // IQ4_NL, IQ4_XS
using MX4 = Numbers<4, 32, false, MX>;      // MXFP4

}  // namespace rvllm::gemm
