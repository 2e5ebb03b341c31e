// Keys and values in e4m3: how a block of the paged cache lies in memory, and how rows get in and out.
//
// A row is one position's D elements of one head, of a 16-bit type T: codes times a power of two, the row's own, so that
// what is read back is exactly a number of T. Attention over such a cache is attention over rounded keys and values, to
// the last bit, wherever codes become numbers again.
//
// A piece is a head's sixteen positions: 16 D bytes of codes, then a byte a position, the exponent of T in the factor
// that expand() multiplies with (Exponents<T>::ONE is that of 1; INFINITE where an element was no finite number).
//
//   keys     row p at p D. A word has the columns {0, 1, 8, 9} + 2 c of sixteen, which mma's B fragment has together, as
//            bytes 1, 3, 0 and 2; a 16-byte chunk those of four times sixteen columns, the chunks of c = 0 .. 3 side by
//            side; in odd rows pairs of such groups are swapped, so that eight lanes read from all banks. Columns behind
//            the last multiple of 64 follow, c by c.
//   values   rows of 2 D bytes: row r has positions r + 8 and r in turns, column by column, so that a transposed
//            ldmatrix gives mma's B fragment of sixteen positions; the 16-byte chunk j of row r at j ^ r where D % 64 == 0.
#pragma once

#include "attention/kv_block.cuh"
#include "common/common.cuh"
#include "gemm/fp8/e4m3.cuh"

namespace rvllm::kv8 {

inline constexpr int POSITIONS = KV_BLOCK;

__device__ __forceinline__ constexpr int piece_bytes(int D) { return POSITIONS * (D + 1); }
// Where the word of keys of `row` is that has columns 16 k + 2 c + {0, 1, 8, 9}.
__device__ __forceinline__ constexpr int key_word(int D, int row, int k, int c) {
  const int group = k / 4, whole = D / 64, rest = D / 16 % 4;
  if (group >= whole) return row * D + whole * 64 + (c * rest + k - whole * 4) * 4;
  return row * D + ((group ^ (D % 128 == 0 ? row & 1 : 0)) * 4 + c) * 16 + k % 4 * 4;
}
// Where chunk j, columns 8 j to 8 j + 7, of values' row r is.
__device__ __forceinline__ constexpr int value_chunk(int D, int r, int j) {
  return r * 2 * D + (D % 64 == 0 ? j ^ r : j) * 16;
}

// Powers of two are kept from 2^LOW to 2^HIGH: of larger numbers the codes saturate, smaller ones have fewer of them.
inline constexpr int HIGH = 7;
template <typename T> struct Exponents;
template <> struct Exponents<bf16> {
  static constexpr int ONE = 247, LOW = -40, INFINITE = 255, SHIFT = 7;
};
template <> struct Exponents<f16> {
  static constexpr int ONE = 23, LOW = -15, INFINITE = 31, SHIFT = 10;
};

// Bytes 1 and 3 of a word of codes, and bytes 0 and 2, as pairs of T that are too small by 2^120 or 2^8.
__device__ __forceinline__ u32 high_codes(u32 w, bf16) { return (w >> 4 & 0x07f007f0) | (w & 0x80008000); }
__device__ __forceinline__ u32 low_codes(u32 w, bf16) { return (w << 4 & 0x07f007f0) | (w << 8 & 0x80008000); }
__device__ __forceinline__ u32 high_codes(u32 w, f16) { return (w >> 1 & 0x3f803f80) | (w & 0x80008000); }
__device__ __forceinline__ u32 low_codes(u32 w, f16) { return (w << 7 & 0x3f803f80) | (w << 8 & 0x80008000); }

// The product of pairs: exact here, as one factor is a power of two.
__device__ __forceinline__ u32 times(u32 a, u32 b, bf16) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}
__device__ __forceinline__ u32 times(u32 a, u32 b, f16) {
  const __half2 r = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const u32*>(&r);
}
// Factors of one position twice, and of two neighbouring ones, from their bytes.
template <typename T> __device__ __forceinline__ u32 factor_of(u32 byte) {
  return byte << Exponents<T>::SHIFT | byte << (16 + Exponents<T>::SHIFT);
}
template <typename T> __device__ __forceinline__ u32 factors_of(u32 bytes) {
  return (bytes & 0xff) << Exponents<T>::SHIFT | (bytes & 0xff00) << (8 + Exponents<T>::SHIFT);
}
template <typename T> __device__ __forceinline__ u32 expand_high(u32 w, u32 factor) { return times(high_codes(w, T()), factor, T()); }
template <typename T> __device__ __forceinline__ u32 expand_low(u32 w, u32 factor) { return times(low_codes(w, T()), factor, T()); }

// Writes a position's row, given as D / 2 words of two elements each, into its piece. One warp.
template <typename T>
__device__ __forceinline__ void store_row(u8* piece, const u32* row, int D, int position, bool key, int lane) {
  using X = Exponents<T>;
  u32 top = 0;  // the bits of the largest magnitude
  for (int i = lane; i < D / 2; i += 32) {
    const float2 v = unpack2<T>(row[i]);
    top = max(top, max(__float_as_uint(v.x) & 0x7fffffff, __float_as_uint(v.y) & 0x7fffffff));
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) top = max(top, __shfl_xor_sync(~0u, top, o));
  // The least power of two that brings it to 448 or less: 448 is 1.75 * 2^8.
  const int exponent = static_cast<int>(top >> 23) - 127 - 8 + ((top & 0x7fffff) > 0x600000);
  const int power = min(HIGH, max(X::LOW, exponent));
  const float inverse = __uint_as_float((127 - power) << 23);
  const auto codes = [&](float low, float high) { return fp8::to_e4m3x2(__fmul_rn(low, inverse), __fmul_rn(high, inverse)); };
  if (key) {
    for (int i = lane; i < D / 4; i += 32) {
      const int k = i / 4, c = i % 4;
      const float2 a = unpack2<T>(row[8 * k + c]), b = unpack2<T>(row[8 * k + c + 4]);
      *reinterpret_cast<u32*>(piece + key_word(D, position, k, c)) = codes(b.x, a.x) | codes(b.y, a.y) << 16;
    }
  } else {
    for (int i = lane; i < D / 2; i += 32) {
      const float2 v = unpack2<T>(row[i]);
      const u32 both = codes(v.x, v.y);
      u8* const to = piece + value_chunk(D, position % 8, i / 4) + i % 4 * 4 + (position < 8);
      to[0] = static_cast<u8>(both);
      to[2] = static_cast<u8>(both >> 8);
    }
  }
  if (lane == 0) piece[POSITIONS * D + position] = static_cast<u8>(top >= 0x7f800000 ? X::INFINITE : X::ONE + power);
}

// ---- fragments of decode's products: pieces of a tile of 64 positions lie one behind the other in shared memory --------

// s = q k^T of the tile's first `blocks` pieces, laid out and summed as attention.cuh's scores_of does; query(k) gives
// mma's A fragment of columns 16 k on. PIECES at a time: with four of them products wait less for each other, and more
// registers are taken.
template <typename T, int D, int PIECES, typename Query>
__device__ __forceinline__ void scores(float (&s)[8][4], Query query, const u8* keys, int blocks, int lane) {
  const int row = lane / 4, c = lane % 4;
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.f;
#pragma unroll
  for (int first = 0; first < 4; first += PIECES) {
    if (first >= blocks) break;
    u32 factor[2 * PIECES];
#pragma unroll
    for (int n = 0; n < 2 * PIECES; n++)
      factor[n] = factor_of<T>(keys[(first + n / 2) * piece_bytes(D) + POSITIONS * D + row + n % 2 * 8]);
#pragma unroll
    for (int group = 0; group < (D + 63) / 64; group++) {
      const int count = group < D / 64 ? 4 : D / 16 % 4;
      u32 w[2 * PIECES][4];
#pragma unroll
      for (int n = 0; n < 2 * PIECES; n++) {
        const u8* const at = keys + (first + n / 2) * piece_bytes(D) + key_word(D, row + n % 2 * 8, 4 * group, c);
        if (count == 4) {
          const uint4 v = *reinterpret_cast<const uint4*>(at);
          w[n][0] = v.x, w[n][1] = v.y, w[n][2] = v.z, w[n][3] = v.w;
        } else {
#pragma unroll
          for (int k = 0; k < 3; k++)
            if (k < count) w[n][k] = *reinterpret_cast<const u32*>(at + 4 * k);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (k >= count) break;
        u32 a[4];
        query(a, 4 * group + k);
#pragma unroll
        for (int n = 0; n < 2 * PIECES; n++)
          mma_16816(s[2 * first + n], a, {expand_high<T>(w[n][k], factor[n]), expand_low<T>(w[n][k], factor[n])}, T());
      }
    }
  }
}

// x = p v of the tile's first `blocks` pieces, laid out and summed as attention.cuh's values_of does. Positions outside
// [lo, hi) are taken as zeros.
template <typename T, int D>
__device__ __forceinline__ void values(float (&x)[D / 8][4], const u32 (&p)[4][4], const u8* values, int blocks, int lo, int hi,
                                       int lane) {
  constexpr int EACH = D % 32 == 0 ? 4 : 2;  // eight columns each, of a load
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) x[n][i] = 0.f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (j >= blocks) break;
    const u8* const piece = values + j * piece_bytes(D);
    u32 factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int in = lane % 4 * 2 + 8 * h, position = 16 * j + in;
      const u32 bytes = *reinterpret_cast<const u16*>(piece + POSITIONS * D + in);
      factor[h] = factors_of<T>(bytes & ((position >= lo && position < hi ? 0xff : 0) |
                                         (position + 1 >= lo && position + 1 < hi ? 0xff00 : 0)));
    }
    const int r = lane % 8;
    const u32 base = smem(piece);
#pragma unroll
    for (int g = 0; g < D / 8 / EACH; g++) {
      u32 w[EACH];
      const u32 at = base + value_chunk(D, r, EACH * g + lane / 8 % EACH);
      if constexpr (EACH == 4)
        ldmatrix_x4_trans(w, at);
      else
        ldmatrix_x2_trans(w, at);
#pragma unroll
      for (int n = 0; n < EACH; n++)
        mma_16816(x[EACH * g + n], p[j], {expand_high<T>(w[n], factor[0]), expand_low<T>(w[n], factor[1])}, T());
    }
  }
}

// ---- tiles of T in shared memory, for kernels that read each several times ----------------------------------------------

// Rows of T, `pitch` elements apart, of pieces [first, end) of a tile of keys. Thread `rank` of THREADS.
template <typename T, int D, int THREADS>
__device__ __forceinline__ void expand_keys(T* tile, int pitch, const u8* keys, int first, int end, int rank) {
#pragma unroll 4
  for (int i = first * POSITIONS * (D / 4) + rank; i < end * POSITIONS * (D / 4); i += THREADS) {
    const int row = i / (D / 4), k = i % (D / 4) / 4, c = i % 4;
    const u8* const piece = keys + row / POSITIONS * piece_bytes(D);
    const u32 w = *reinterpret_cast<const u32*>(piece + key_word(D, row % POSITIONS, k, c));
    const u32 factor = factor_of<T>(piece[POSITIONS * D + row % POSITIONS]);
    u32* const to = reinterpret_cast<u32*>(tile + row * pitch + 16 * k + 2 * c);
    to[0] = expand_high<T>(w, factor);
    to[4] = expand_low<T>(w, factor);
  }
}
// The same of values; rows outside [lo, hi) become zeros.
template <typename T, int D, int THREADS>
__device__ __forceinline__ void expand_values(T* tile, int pitch, const u8* values, int first, int end, int lo, int hi, int rank) {
#pragma unroll 2
  for (int i = first * D + rank; i < end * D; i += THREADS) {  // chunks of eight columns of two rows
    const int r = i / (D / 8) % 8, row = i / D * POSITIONS + r, j = i % (D / 8);
    const u8* const piece = values + i / D * piece_bytes(D);
    const uint4 v = *reinterpret_cast<const uint4*>(piece + value_chunk(D, r, j));
    const auto factor = [&](int at) { return at >= lo && at < hi ? factor_of<T>(piece[POSITIONS * D + at % POSITIONS]) : 0u; };
    const u32 upper = factor(row), lower = factor(row + 8);
    *reinterpret_cast<uint4*>(tile + row * pitch + 8 * j) =
        make_uint4(expand_high<T>(v.x, upper), expand_high<T>(v.y, upper), expand_high<T>(v.z, upper), expand_high<T>(v.w, upper));
    *reinterpret_cast<uint4*>(tile + (row + 8) * pitch + 8 * j) =
        make_uint4(expand_low<T>(v.x, lower), expand_low<T>(v.y, lower), expand_low<T>(v.z, lower), expand_low<T>(v.w, lower));
  }
}

// Asks for pieces of a tile: those whose bit is set in `wanted`. Thread `rank` of THREADS.
template <int D, int THREADS>
__device__ __forceinline__ void load_pieces(u8* tile, const u8* cache, const int4 ids, int head, int kv_heads, u32 wanted, int rank) {
  constexpr int CHUNKS = piece_bytes(D) / 16;
#pragma unroll
  for (int b = 0; b < 4; b++) {
    if (!(wanted >> b & 1)) continue;
    const int id = b == 0 ? ids.x : b == 1 ? ids.y : b == 2 ? ids.z : ids.w;
    const u8* const source = cache + (static_cast<size_t>(id) * kv_heads + head) * piece_bytes(D);
#pragma unroll 4
    for (int i = rank; i < CHUNKS; i += THREADS) cp_async16(smem(tile + b * piece_bytes(D)) + i * 16, source + i * 16);
  }
}
// The pieces with something of rows [lo, hi).
__device__ __forceinline__ u32 pieces_of(int lo, int hi) {
  const int end = min(4, (hi + POSITIONS - 1) / POSITIONS), first = max(0, lo) / POSITIONS;
  return end > first ? (1u << end) - (1u << first) : 0u;
}

}  // namespace rvllm::kv8
