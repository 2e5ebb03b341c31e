// GPTQ, AWQ and compressed-tensors matrices into chunks, as they are stored: levels in 32-bit words.
#include "gemm/integer/pack.cuh"

namespace rvllm::gemm {

// Integers packed in words from the low end. Element (n, k): words lie at n / n_per * n_stride + k / k_per * k_stride.
struct PackedWords {
  const u32* words;
  long long n_stride, k_stride;
  int n_per, k_per, n_skip;  // n_skip: elements of the first word that come before row 0
  int awq;                   // whether successive n lie at places 0 4 1 5 2 6 3 7 of a word

  template <int BITS>
  __device__ __forceinline__ u32 at(long long n, long long k) const {
    const long long m = n + n_skip;
    const u32 word = words[m / n_per * n_stride + k / k_per * k_stride];
    int place = static_cast<int>(m % n_per + k % k_per);
    if (awq) place = place / 2 + place % 2 * 4;
    return word >> place * BITS & ((1u << BITS) - 1);
  }
};

enum ScaleKind : int { SCALE_F16 = 0, SCALE_BF16 = 1, SCALE_F32 = 2 };

// Bits of a zero as the kernels want it, see Integers in formats.cuh.
template <class T, int BITS>
__device__ __forceinline__ u32 zero_bits(u32 zero) {
  if (BITS == 8) return half_bits(static_cast<float>(zero));
  return (Half2<T>::MAGIC & 0xffff) + zero;  // both formats step by ones there
}

// levels [rows, k], zeros and scales [rows, groups], group_size packed columns a group. order: the stored column that
// packed column k is of, -1 for none, or null. zeros.words null: all are 2^(BITS - 1); plus_one: they are stored one less.
// flip: bits of levels and zeros that are turned over. Scales: element (n, g) at n * scale_n + g * scale_g.
template <class T, int BITS, int GROUP>
__global__ void pack_words(u8* __restrict__ packed, long long first, long long rows, long long padded, int interleave,
                           int k, const u32* levels, long long level_n, long long level_k, int level_n_per, int level_k_per,
                           int level_skip, const u32* zeros, long long zero_n, long long zero_g, int zero_n_per,
                           int zero_g_per, int zero_skip, int awq, int plus_one, int flip, const void* scales, int scale_kind,
                           long long scale_n, long long scale_g, int group_size, const int* order) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  using F = Integers<BITS, GROUP>;
  struct Source {
    PackedWords levels, zeros;
    const void* scales;
    int scale_kind, k, plus_one, flip, group_size;
    long long scale_n, scale_g;
    const int* order;
    __device__ u32 level(long long n, int column) const {
      if (column >= k) return 0;
      const int stored = order ? order[column] : column;
      return stored < 0 ? 0 : levels.template at<BITS>(n, stored) ^ flip;
    }
    __device__ u32 word(long long n, int column) const {
      if (column >= k) return 0;
      const long long g = column / group_size, at = n * scale_n + g * scale_g;
      u32 zero = 1u << (BITS - 1);
      if (zeros.words) zero = ((zeros.template at<BITS>(n, g) ^ flip) + plus_one) & ((1u << BITS) - 1);
      const float scale = scale_kind == SCALE_F32   ? static_cast<const float*>(scales)[at]
                          : scale_kind == SCALE_F16 ? __half2float(static_cast<const f16*>(scales)[at])
                                                    : __bfloat162float(static_cast<const bf16*>(scales)[at]);
      return half_bits(scale) | zero_bits<T, BITS>(zero) << 16;
    }
  };
  const Source source{{levels, level_n, level_k, level_n_per, level_k_per, level_skip, awq},
                      {zeros, zero_n, zero_g, zero_n_per, zero_g_per, zero_skip, awq},
                      scales, scale_kind, k, plus_one, flip, group_size, scale_n, scale_g, order};
  pack_rows<F, BITS>(packed, Rows{first, rows, padded, interleave}, (k + CHUNK_K - 1) / CHUNK_K, source);
}

// Random levels where real ones would be, and one word of scales for all rows. Chunks of `chunk` bytes, the first
// `scales` of them for scales, both multiples of 4; raised: MAGIC is added to the word's upper half.
template <class T>
__global__ void fill(u32* __restrict__ packed, u64 words, int chunk, int scales, u32 scale_word, int raised, u32 seed) {
  ptx::griddep_launch();
  ptx::griddep_wait();
  if (raised) scale_word += Half2<T>::MAGIC & 0xffff0000;
  for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < words;
       i += static_cast<u64>(gridDim.x) * blockDim.x) {
    u32 v = static_cast<u32>(i) * 0x9E3779B1u ^ seed;
    v ^= v >> 16, v *= 0x85EBCA6Bu, v ^= v >> 13, v *= 0xC2B2AE35u, v ^= v >> 16;
    packed[i] = static_cast<int>(i % (chunk / 4)) * 4 < scales ? scale_word : v;
  }
}

}  // namespace rvllm::gemm
