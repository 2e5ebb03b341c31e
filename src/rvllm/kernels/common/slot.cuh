// What the sampler keeps of a slot, and the noise by which its rows draw: sampling kernels and the head's epilogue see it.
#pragma once

#include "common/best.cuh"
#include "ptx/ptx.cuh"

namespace rvllm::drawing {

// One slot's parameters; the host's image of it is `SLOT` in backends/cuda/ops/sampling/slots.py. 64 bytes.
struct __align__(16) Slot {
  float temperature;       // below GREEDY: the largest logit
  u32 noise_key, noise_high;  // of this token's noise; slot_start and sample_pick set them
  int top_k;               // 0: all
  float top_p, min_p;
  float repetition, presence, frequency;
  int min_tokens;
  u64 seed;
  int generated;  // tokens drawn since the end of the prompt
  u32 flags;
  int biases, stops;  // lengths of the slot's lists
};
inline constexpr float GREEDY = 1e-5f;
inline constexpr u32 HISTORY = 1;  // of flags: token counts are kept for this slot

// Philox4x32-10 (Salmon et al. 2011); counter words above the first are zero.
__device__ __forceinline__ uint4 philox(u64 key, u32 counter) {
  u32 c0 = counter, c1 = 0, c2 = 0, c3 = 0, k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Philox2x32-7, the fewest rounds of it that pass BigCrush.
__device__ __forceinline__ uint2 philox2(u32 key, u32 low, u32 high) {
#pragma unroll
  for (int round = 0; round < 7; round++) {
    const u32 h = __umulhi(0xD256D193u, low), l = 0xD256D193u * low;
    low = h ^ key ^ high;
    high = l;
    key += 0x9E3779B9u;
  }
  return make_uint2(low, high);
}

// How a row draws by temperature alone: the largest of logit / temperature plus Gumbel noise, whose arg max has the
// softmax's distribution (Gumbel 1954; Yellott 1977). The noise of id i is made of word i / 8 % 2 of Philox2x32-7 with the
// key and the counter's high word that Philox4x32-10 gives for the request's seed and the number of tokens drawn, and
// the low word i / 16 * 8 + i % 8: ids 8 apart, which a thread of a matrix product has, share one call. Every operation is
// rounded as written, so that all kernels draw the same token.
struct Noise {
  float per_degree;  // 1 / temperature; 0: none, the row is greedy
  u32 key, high;

  __device__ __forceinline__ static Noise of(float temperature, u32 key, u32 high) {
    return {temperature < GREEDY ? 0.f : __frcp_rn(temperature), key, high};
  }
  __device__ __forceinline__ uint2 words(int id) const { return philox2(key, (u32)(id / 16 * 8 + id % 8), high); }

  // -log(-log(u)) of a word, where u = 1 - (word + 1/2) / 2^32: exact to 1e-5 also where u is near 1.
  __device__ __forceinline__ static float gumbel(u32 word) {
    const bool near_one = word < 1u << 28;
    const float part = __fmaf_rn((float)(near_one ? word : ~word), 0x1p-32f, 0x1p-33f);
    // v + v^2 / 2 + v^3 / 3 + ... or -log(u).
    const float series =
        __fmul_rn(part, __fmaf_rn(part, __fmaf_rn(part, __fmaf_rn(part, __fmaf_rn(part, 0.2f, 0.25f), 1.f / 3), 0.5f), 1.f));
    const float wait = near_one ? series : __fmul_rn(ptx::log2_fast(part), -0.693147181f);
    return __fmul_rn(ptx::log2_fast(wait), -0.693147181f);
  }
  __device__ __forceinline__ float drawn(float logit, u32 word) const {
    return __fadd_rn(__fmul_rn(logit, per_degree), gumbel(word));
  }
  // Of one id; a greedy row's logit is as it was.
  __device__ __forceinline__ float of_id(float logit, int id) const {
    if (per_degree == 0.f) return logit;
    const uint2 both = words(id);
    return drawn(logit, id & 8 ? both.y : both.x);
  }
};

// Whether nothing but the temperature says what is drawn.
__device__ __forceinline__ bool unfiltered(const Slot& slot, int vocab) {
  return (slot.top_k <= 0 || slot.top_k >= vocab) && slot.top_p >= 1.f && slot.min_p <= 0.f;
}
__device__ __forceinline__ Noise noise_of(const Slot& slot) { return Noise::of(slot.temperature, slot.noise_key, slot.noise_high); }

// Of the step's metadata (backends/cuda/layout/metadata.py has it whole), words from its begin.
inline constexpr int NUM_SAMPLES = 2;   // rows whose logits are wanted
inline constexpr int BEST_ONLY = 6;     // what the head leaves: 0 logits, FIND_BEST, or DRAW
inline constexpr int SLOTS = 10;        // the address of Slot [slots], two words
inline constexpr int SAMPLE_SLOTS = 12; // the word at which the slots of rows begin
inline constexpr int FIND_BEST = 1;     // the best of each HEAD_TILE logits: all rows are greedy
inline constexpr int DRAW = 2;          // the same with each row's noise: rows draw by temperature, or are greedy

// What the rows of a step draw by.
struct RowDraws {
  const int* header;

  __device__ __forceinline__ Noise of(int row) const {
    if (row >= header[NUM_SAMPLES]) return {0.f, 0, 0};
    const int number = header[header[SAMPLE_SLOTS] + row];
    if (number < 0) return {0.f, 0, 0};
    const Slot* const slots = *reinterpret_cast<const Slot* const*>(header + SLOTS);
    const uint4 front = *reinterpret_cast<const uint4*>(slots + number);  // temperature, noise_key, noise_high
    return Noise::of(__uint_as_float(front.x), front.y, front.z);
  }
};

}  // namespace rvllm::drawing
