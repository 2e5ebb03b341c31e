// What the sampling kernels share: ordered keys, exact selection.
#pragma once

#include "common/best.cuh"
#include "common/common.cuh"
#include "common/slot.cuh"

using namespace rvllm::drawing;

inline constexpr u16 IN_PROMPT = 0x8000;  // in a token's count: it occurs in the prompt; the rest counts the output
inline constexpr int CHUNK = 1024;     // logits one warp of sample_scan looks at
inline constexpr int SCAN_WARPS = 8;   // warps of its blocks
inline constexpr int HEAD_TILE = 64;   // logits of which the head leaves the best, where no more is asked for
inline constexpr int MAX_BIASES = 1024, MAX_STOPS = 128, MAX_TOP = 20;

// Floats as unsigned numbers of the same order.
__device__ __forceinline__ u32 key_of(float x) {
  const u32 u = __float_as_uint(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float value_of(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
inline constexpr u32 LOWEST_KEY = 0x007fffffu + 1;  // just above minus infinity

// A token's weight, 1 for the most likely one.
__device__ __forceinline__ float likelihood(float x, float maximum) { return exp2_fast((x - maximum) * LOG2E); }

// A weight as a fixed-point number, 2^40 for 1, so that sums are exact and hence independent of their order.
// Shifting the mantissa is quicker than converting.
__device__ __forceinline__ u64 fixed_point(float weight) {
  const u32 e = __float_as_uint(weight);
  const int shift = (int)(e >> 23) - 127 + 40 - 23;
  const u64 mantissa = (e & 0x7fffffu) | 0x800000u;
  return shift >= 0 ? mantissa << shift : shift > -24 ? mantissa >> -shift : 0;
}

__device__ __forceinline__ u64 weight_of(float x, float maximum) { return fixed_point(likelihood(x, maximum)); }

// The block's best, in every thread. scratch: 32 elements.
__device__ __forceinline__ Best block_best(Best x, Best* scratch) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = better(x, {__shfl_xor_sync(~0u, x.value, o), __shfl_xor_sync(~0u, x.id, o)});
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  Best best = scratch[0];
  for (int w = 1; w < blockDim.x / 32; w++) best = better(best, scratch[w]);
  return best;
}

inline constexpr int BINS = 2048, PICK_THREADS = 1024, MAX_CHUNKS = PICK_THREADS;

// Shared memory of select_key: a histogram of 64-bit sums in two halves, since shared memory adds 32 bits natively.
struct Histogram {
  u32 low[BINS], high[BINS];
  u64 warp_sums[32];
  u32 bin;
  u64 above;
};

__device__ __forceinline__ void histogram_add(Histogram& h, u32 bin, u64 x) {
  const u32 low = (u32)x, old = atomicAdd(&h.low[bin], low);
  const u32 high = (u32)(x >> 32) + (old + low < old);
  if (high) atomicAdd(&h.high[bin], high);
}

// A row of `vocab` logits, 16-byte aligned and padded to four. maxima (shared): of each CHUNK of it, or null.
struct Row {
  const float* x;
  int vocab;
  const float* maxima;
};

// Visits the elements of chunk c, four neighbours and the first one's id at a time, beyond the row minus infinity;
// a warp calls.
template <typename Visit> __device__ __forceinline__ void fours_of(const Row& row, int c, Visit visit) {
  constexpr int AHEAD = 4;  // loads in flight a thread
#pragma unroll
  for (int part = 0; part < CHUNK; part += AHEAD * 128) {
    const int base = c * CHUNK + part + threadIdx.x % 32 * 4;
    float4 v[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (base + a * 128 < row.vocab) v[a] = *reinterpret_cast<const float4*>(row.x + base + a * 128);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      const int i = base + a * 128;
      if (i >= row.vocab) continue;
      if (i + 1 >= row.vocab) v[a].y = -INFINITY_F;
      if (i + 2 >= row.vocab) v[a].z = -INFINITY_F;
      if (i + 3 >= row.vocab) v[a].w = -INFINITY_F;
      visit(v[a], i);
    }
  }
}

// Visits (value, id) of the row's elements but those in chunks that hold nothing at or above `floor`; the block
// calls, a warp takes a chunk at a time.
template <typename Visit> __device__ __forceinline__ void each(const Row& row, u32 floor, Visit visit) {
  for (int c = threadIdx.x / 32; c * CHUNK < row.vocab; c += blockDim.x / 32)
    if (!row.maxima || key_of(row.maxima[c]) >= floor)
      fours_of(row, c, [&](const float4& v, int i) {
        visit(v.x, i);
        if (i + 1 < row.vocab) visit(v.y, i + 1);
        if (i + 2 < row.vocab) visit(v.z, i + 2);
        if (i + 3 < row.vocab) visit(v.w, i + 3);
      });
}

// Sum of x over the threads before this one, and over all of the block. scratch: 32 elements.
__device__ __forceinline__ u64 block_scan(u64 x, u64* scratch, u64& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 sum = x;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const u64 other = __shfl_up_sync(~0u, sum, o);
    if (lane >= o) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  u64 before = sum - x;
  total = 0;
  for (int w = 0; w < blockDim.x / 32; w++) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  return before;
}

// The largest key t such that what lies at or above it measures at least `target` > 0: elements are counted, or,
// with WEIGHTS, their weights summed, and the target is `share` of that sum. Elements below `floor` do not take part;
// if all of them together measure less, the answer is `floor`. above: the measure of what lies strictly above t.
// Three passes over the row, each settling 11 or 10 bits. PICK_THREADS threads; the same answer in every thread.
template <bool WEIGHTS>
__device__ u32 select_key(const Row& row, float maximum, u32 floor, double share, u64& target, Histogram& h, u64& above) {
  u32 prefix = 0;
  above = 0;
  for (int level = 0; level < 3; level++) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
    const u32 lowest = level == 0 ? floor : max(floor, prefix << (shift + bits));
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += PICK_THREADS) h.low[i] = h.high[i] = 0;
    if (threadIdx.x == 0) h.bin = ~0u;
    __syncthreads();
    each(row, lowest, [&](float x, int) {
      const u32 key = key_of(x);
      if (key < lowest || (level > 0 && key >> (shift + bits) != prefix)) return;
      const u64 measure = WEIGHTS ? weight_of(x, maximum) : 1;
      if (measure) histogram_add(h, key >> shift & ((1u << bits) - 1), measure);
    });
    __syncthreads();
    // Sums from the top: thread i holds bins BINS - 1 - 2 i and the one below it.
    const int first = BINS - 1 - 2 * threadIdx.x;
    const u64 a = (u64)h.high[first] << 32 | h.low[first], b = (u64)h.high[first - 1] << 32 | h.low[first - 1];
    u64 total;
    const u64 before = above + block_scan(a + b, h.warp_sums, total);  // everything above this thread's bins
    if (WEIGHTS && level == 0) target = min(total, max((u64)1, (u64)ceil(share * (double)total)));
    if (before < target && before + a >= target) {
      h.bin = first;
      h.above = before;
    } else if (before + a < target && before + a + b >= target) {
      h.bin = first - 1;
      h.above = before + a;
    }
    __syncthreads();
    if (h.bin == ~0u) {
      above = 0;
      return floor;
    }
    prefix = prefix << bits | h.bin;
    above = h.above;
  }
  return prefix;
}
